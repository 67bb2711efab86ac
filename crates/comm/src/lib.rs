//! unisono: communication for the ranks of one job.
pub mod buffer;
pub mod call;
mod cause;
mod collectives;
mod control;
pub mod error;
pub mod launch;
pub mod operations;
mod reduce;
pub mod store;

pub use buffer::{Buf, BufMut, Place, RawBuffer};
pub use call::{Call, Kind};
pub use error::{Error, Result};
pub use operations::Operations;
pub use unisono_core::settings;
pub use unisono_core::{DType, Element, ReduceOp, Reducible, Secret, UniqueId};
pub use unisono_sync::Deadline;
