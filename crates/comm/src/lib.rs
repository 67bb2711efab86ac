//! unisono: communication for the ranks of one job.
//!
//! Ranks are processes or threads of one host. They meet through a store, share memory, and move and reduce data
//! together: deterministically, and without ever waiting for ever. Every public operation works without a GPU.
//!
//! ```
//! use unisono::{Communicator, Operations, ReduceOp};
//!
//! // Four ranks as threads of this process; `Communicator::from_env()` makes one of a process that was started by
//! // `unisono run`, `torchrun`, `mpirun` or `srun`.
//! let threads: Vec<_> = Communicator::threads(4)?
//!     .into_iter()
//!     .map(|rank| {
//!         std::thread::spawn(move || {
//!             let mut gradient = vec![rank.rank() as f32; 1000];
//!             rank.all_reduce(&mut gradient, ReduceOp::Sum)?;
//!             assert!(gradient.iter().all(|value| *value == 6.0));
//!             rank.destroy()
//!         })
//!     })
//!     .collect();
//! for thread in threads {
//!     thread.join().unwrap()?;
//! }
//! # Ok::<(), unisono::Error>(())
//! ```

pub mod binding;
pub mod buffer;
pub mod builder;
pub mod call;
mod cause;
mod collectives;
pub mod communicator;
mod control;
mod copies;
mod counted;
mod derive;
pub mod ep;
pub mod error;
pub mod explanation;
pub mod fused;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod group;
pub mod host;
pub mod launch;
mod neighbours;
pub mod observer;
pub mod operations;
pub mod recorder;
mod reduce;
#[cfg(doctest)]
mod refusals;
#[cfg(feature = "cuda")]
pub mod registration;
mod rendezvous;
pub mod scope;
mod shrink;
pub mod store;
pub mod stream;
pub mod symmetric;
pub mod tuning;
pub mod window;

pub use buffer::{Buf, BufMut, Place, RawBuffer};
pub use builder::Builder;
pub use call::{Call, Counts, Kind};
pub use communicator::Communicator;
pub use counted::{AllToAllCounted, Count};
pub use error::{Error, Result};
pub use explanation::{Choice, Explanation, OnGpus};
pub use fused::{AllReduceRmsNorm, HalfFloat, Normalised, Quantisable};
#[cfg(feature = "cuda")]
pub use gpu::{DeviceView, device_header};
pub use group::{Group, Grouped, GroupedEach, Promised, group};
pub use observer::{Observer, State};
pub use operations::Operations;
#[cfg(feature = "cuda")]
pub use registration::Registration;
pub use scope::{Pending, Scope};
pub use stream::{OnEach, OnStream, Stream};
pub use symmetric::Symmetric;
pub use unisono_core::device::Form;
pub use unisono_core::element::{Bool8, f8e4m3, f8e5m2};
pub use unisono_core::select::Algorithm;
pub use unisono_core::settings::{Order, Require};
pub use unisono_core::topology::{Link, Topology};
pub use unisono_core::{
    Complex, DType, Element, Error as CoreError, ReduceOp, Reducible, Secret, UniqueId, half, quantised,
    reduce_op, settings,
};
#[cfg(feature = "cuda")]
pub use unisono_cuda as cuda;
pub use unisono_node::Error as NodeError;
pub use unisono_sync::Deadline;
pub use window::{Closing, Memory, Window};

/// The examples of the README, as doc tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
mod readme {}

/// The examples of the book, as doc tests: pages that have some.
#[cfg(doctest)]
mod book {
    #[doc = include_str!("../../../docs/src/coming-from.md")]
    mod coming_from {}
    #[doc = include_str!("../../../docs/src/concepts.md")]
    mod concepts {}
    #[doc = include_str!("../../../docs/src/failures.md")]
    mod failures {}
    #[doc = include_str!("../../../docs/src/gpus.md")]
    mod gpus {}
    #[doc = include_str!("../../../docs/src/install.md")]
    mod install {}
    #[doc = include_str!("../../../docs/src/launchers.md")]
    mod launchers {}
    #[doc = include_str!("../../../docs/src/tour.md")]
    mod tour {}
    #[doc = include_str!("../../../docs/src/tuning.md")]
    mod tuning {}
}
