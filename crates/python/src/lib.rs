//! The native half of the Python package `unisono`: classes over [`unisono::Communicator`], its stores and one-sided memory.
//!
//! A call from Python goes: read the arguments, look where each array lies (`array`), lock the communicator and give the interpreter
//! away, submit, take it back. There is no Python code on that way. The communicator stands behind a mutex, its observer beside it, so
//! that `abort` and `explain` never wait; a wait asks for signals of the terminal once in 20 ms (`interrupt`).
//!
//! Here: no algorithm and no kernel. The Python half (`python/unisono`) holds what needs no speed: exceptions, the command's door, types.

mod array;
mod buffer;
mod call;
mod communicator;
mod dlpack;
mod dtype;
mod ep;
mod errors;
mod group;
mod interrupt;
mod kept;
mod operations;
mod options;
mod progress;
mod store;
mod stream;
mod symmetric;
mod torch_store;
mod view;
mod window;
mod work;

use pyo3::prelude::*;

/// What `unisono` is made of; the package re-exports what is public.
#[pymodule]
mod _native {
    use std::ffi::OsString;
    use std::path::PathBuf;

    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::communicator::Communicator;
    #[pymodule_export]
    use crate::ep::{
        Buffer, Combined, Dispatched, Handle, Layout, LowLatencyCombined, LowLatencyDispatched,
        LowLatencyHandle, SentCombine, SentDispatch,
    };
    #[pymodule_export]
    use crate::group::{Group, group};
    #[pymodule_export]
    use crate::store::{
        FileStore, MemoryStore, PrefixStore, Store, StoreServer, TcpStore, TorchStore, TorchStoreServer,
        UniqueId,
    };
    #[pymodule_export]
    use crate::symmetric::SymmetricMemory;
    #[pymodule_export]
    use crate::view::View;
    #[pymodule_export]
    use crate::window::{Registration, Window};
    #[pymodule_export]
    use crate::work::Work;

    /// Runs the command `unisono` with `arguments`; `program` starts it again for ranks of its own. The exit code.
    #[pyfunction]
    fn command(py: Python<'_>, program: Vec<OsString>, arguments: Vec<OsString>) -> u8 {
        py.detach(|| unisono_cli::main_within(program, arguments))
    }

    /// Says where kernels lie that were compiled ahead of time.
    #[pyfunction]
    fn kernels_in(folder: PathBuf) {
        unisono::cuda::packs::look_into(folder);
    }

    /// The classes of errors that the library raises, each with the names of its attributes.
    #[pyfunction]
    fn error_kinds() -> Vec<(String, Vec<&'static str>)> {
        crate::errors::kinds()
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
