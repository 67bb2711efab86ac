//! The CUDA stream of a call: the one that is given, or the framework's current one.

use pyo3::intern;
use pyo3::prelude::*;

use crate::array::{Site, StreamOf, imported};

/// The `CUstream` that a `stream=` names: a number, or an object of torch, cupy, numba or with `__cuda_stream__`.
///
/// # Errors
/// `ArgumentError` if it is none of these.
pub(crate) fn handle(stream: &Bound<'_, PyAny>, site: Site) -> PyResult<u64> {
    let py = stream.py();
    if let Ok(handle) = stream.extract() {
        return Ok(handle);
    }
    for name in [intern!(py, "cuda_stream"), intern!(py, "ptr"), intern!(py, "handle")] {
        if let Some(handle) = stream.getattr_opt(name)? {
            let value = handle.getattr_opt(intern!(py, "value"))?.unwrap_or(handle);
            // numba's default stream is None.
            return if value.is_none() { Ok(0) } else { value.extract() };
        }
    }
    if let Some(protocol) = stream.getattr_opt(intern!(py, "__cuda_stream__"))? {
        let (_, handle): (u64, u64) = protocol.call0()?.extract()?;
        return Ok(handle);
    }
    let expected = "a CUstream as a number, or a stream of torch, cupy or numba";
    let got = stream.repr()?.to_string();
    Err(Site { what: "stream", ..site }.refuse(py, expected, got))
}

/// The current stream of the framework that an array on device `ordinal` belongs to; the default stream if nobody says.
///
/// # Errors
/// What the framework raises.
pub(crate) fn current(py: Python<'_>, of: StreamOf, ordinal: u32) -> PyResult<u64> {
    match of {
        StreamOf::Named(stream) => Ok(stream),
        StreamOf::Unknown => Ok(0),
        StreamOf::Torch => torch(py, ordinal),
    }
}

fn torch(py: Python<'_>, ordinal: u32) -> PyResult<u64> {
    static QUICK: pyo3::sync::PyOnceLock<Option<Py<PyAny>>> = pyo3::sync::PyOnceLock::new();
    let Some(torch) = imported(py, intern!(py, "torch"))? else { return Ok(0) };
    // What torch's own compiler calls; it makes no object of Python.
    let quick = QUICK.get_or_try_init(py, || {
        let inner = torch.getattr("_C")?.getattr_opt("_cuda_getCurrentRawStream")?;
        PyResult::Ok(inner.map(Bound::unbind))
    })?;
    match quick {
        Some(quick) => quick.bind(py).call1((ordinal,))?.extract(),
        None => {
            let cuda = torch.getattr(intern!(py, "cuda"))?;
            cuda.call_method1(intern!(py, "current_stream"), (ordinal,))?
                .getattr(intern!(py, "cuda_stream"))?
                .extract()
        }
    }
}
