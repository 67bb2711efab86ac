//! The CUDA stream of a call: the one that is given, or the framework's current one.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::array::{Site, StreamOf, imported};

/// The stream that a call was given.
#[derive(Clone, Copy)]
pub(crate) struct Given {
    pub(crate) handle: u64,
    /// The stream that it comes behind, if that was given too.
    pub(crate) behind: Option<Behind>,
}

/// The second stream of a pair.
#[derive(Clone, Copy)]
pub(crate) enum Behind {
    /// That of the framework which is current.
    Current,
    Stream(u64),
}

/// What the `stream=` of a call names: a stream, or a pair of the call's and one that it comes behind (`None`: the current one).
///
/// # Errors
/// As [`handle`].
pub(crate) fn given(stream: &Bound<'_, PyAny>, site: Site) -> PyResult<Given> {
    let Ok(pair) = stream.cast::<PyTuple>() else {
        return Ok(Given { handle: handle(stream, site)?, behind: None });
    };
    if pair.len() != 2 {
        let got = format!("a tuple of {}", pair.len());
        return Err(site.refuse(stream.py(), "a stream, or a pair of them", got));
    }
    let (stream, behind) = (pair.get_item(0)?, pair.get_item(1)?);
    let behind = if behind.is_none() { Behind::Current } else { Behind::Stream(handle(&behind, site)?) };
    Ok(Given { handle: handle(&stream, site)?, behind: Some(behind) })
}

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
