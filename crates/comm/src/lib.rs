//! unisono: communication for the ranks of one job.
pub mod error;
mod launch;
#[allow(dead_code)] // used by the collectives, which are not here yet
mod reduce;
pub mod store;
pub use error::{Error, Result};
pub use unisono_core::{DType, Element, ReduceOp, Reducible, Secret, UniqueId};
pub use unisono_sync::Deadline;
