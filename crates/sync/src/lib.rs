//! Lock-free protocols over borrowed shared memory.
pub mod deadline;
pub use deadline::Deadline;
