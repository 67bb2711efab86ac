//! unisono: communication for the ranks of one job.
pub mod error;
pub mod launch;
mod reduce;
pub mod store;
pub use error::{Error, Result};
pub use unisono_core::settings;
pub use unisono_core::{DType, Element, ReduceOp, Reducible, Secret, UniqueId};
pub use unisono_sync::Deadline;
