//! CUDA for unisono: the driver, the run-time compiler and the view of the links, each opened when it is first needed.
//!
//! Nothing here is linked: `libcuda`, NVRTC and NVML are looked for at run time, and a machine without them answers
//! [`Error::NoDevice`] (or [`Error::NoCompiler`]), never a panic. What never will be here: a rank, a collective.

pub mod error;

pub use error::{Error, Result};
