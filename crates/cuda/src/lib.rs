//! CUDA for unisono: the driver, the run-time compiler and the view of the links, each opened when it is first needed.
//!
//! Nothing here is linked: `libcuda`, NVRTC and NVML are looked for at run time, and a machine without them answers
//! [`Error::NoDevice`] (or [`Error::NoCompiler`]), never a panic. What never will be here: a rank, a collective.

pub mod cache;
pub mod capture;
pub mod device;
pub mod driver;
pub mod error;
pub mod facts;
pub mod foreign;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod graph;
pub mod memory;
pub mod module;
pub mod nvml;
pub mod nvrtc;
pub mod packs;
pub mod places;
pub mod stream;

pub use cache::{Cache, Entry};
pub use capture::Capture;
pub use device::{Device, Uuid};
pub use error::{Error, Result};
pub use facts::{KernelFacts, kernels};
pub use foreign::{Foreign, Imported};
pub use graph::Graph;
pub use memory::{DeviceBuffer, FabricHandle, Location, Pages, RegisteredHost, SharedPages};
pub use module::{Function, Grid, Launching, Module};
pub use nvml::{GpuLinks, Link, Pcie, Remote};
pub use nvrtc::{Architecture, Compiler, Source};
pub use stream::{Event, Stream};
