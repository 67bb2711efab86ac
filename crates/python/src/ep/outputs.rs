//! Outputs as arrays of the framework that asked. An array owns its memory, which is given back when the last view of it dies.

use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use unisono::ep::Tensor;
use unisono::{DType, Place};

use super::buffer::Buffer;
use crate::array::{StreamOf, imported, is_torch_tensor};
use crate::communicator::Communicator;
use crate::stream;
use crate::view::View;

/// Makes arrays of what the calls of a buffer give.
pub(super) struct Outputs {
    framework: Framework,
    communicator: Py<Communicator>,
}

/// Whose arrays a call was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Framework {
    Torch,
    Cupy,
    Numpy,
    /// One that is not known: it makes its arrays of a `View` itself.
    Other,
}

impl Outputs {
    /// As arrays of the framework of `like`.
    pub(super) fn of(buffer: &Buffer, like: &Bound<'_, PyAny>) -> PyResult<Self> {
        let communicator = buffer.communicator.clone_ref(like.py());
        Ok(Self { framework: Framework::of(like)?, communicator })
    }

    /// The same for what is made later.
    pub(super) fn later(&self, py: Python<'_>) -> Self {
        Self { framework: self.framework, communicator: self.communicator.clone_ref(py) }
    }

    /// `tensor` as an array. On a GPU its memory is used again only behind the work that the framework's current stream has by then, too.
    pub(super) fn array(&self, py: Python<'_>, tensor: Tensor) -> PyResult<Py<PyAny>> {
        let (memory, dimensions) = (tensor.raw(), tensor.shape().to_vec());
        if let Place::Cuda { ordinal } = memory.place {
            let of = if self.framework == Framework::Torch { StreamOf::Torch } else { StreamOf::Unknown };
            let (handle, communicator) = (stream::current(py, of, ordinal)?, self.communicator.get());
            let current =
                py.detach(|| communicator.lock().and_then(|mut inner| Ok(inner.stream(handle, ordinal)?)));
            let current = current.map_err(|failure| communicator.raised(py, failure, "an output"))?;
            tensor.use_on(&current);
        }
        let view = View { memory, dimensions, mapping: Some(Arc::new(tensor)) };
        Ok(self.framework.over(py, view)?.unbind())
    }

    /// The same of what may be nothing.
    pub(super) fn array_of(&self, py: Python<'_>, tensor: Option<Tensor>) -> PyResult<Option<Py<PyAny>>> {
        tensor.map(|tensor| self.array(py, tensor)).transpose()
    }
}

impl Framework {
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        if is_torch_tensor(object)? {
            return Ok(Self::Torch);
        }
        if let Some(cupy) = imported(py, intern!(py, "cupy"))?
            && object.is_instance(&cupy.getattr(intern!(py, "ndarray"))?)?
        {
            return Ok(Self::Cupy);
        }
        let has_numpy = imported(py, intern!(py, "numpy"))?.is_some();
        Ok(if has_numpy { Self::Numpy } else { Self::Other })
    }

    fn over(self, py: Python<'_>, view: View) -> PyResult<Bound<'_, PyAny>> {
        let (name, dtype, place) = (view.dtype_name(), view.memory.dtype, view.memory.place);
        match self {
            Self::Torch => {
                let torch = py.import(intern!(py, "torch"))?;
                let take = |view| torch.call_method1(intern!(py, "from_dlpack"), (Bound::new(py, view)?,));
                // Of types of 8 bits not every version of it knows DLPack's names.
                if matches!(dtype, DType::F8E4M3 | DType::F8E5M2) {
                    return take(view.words())?.call_method1(intern!(py, "view"), (torch.getattr(name)?,));
                }
                take(view)
            }
            Self::Cupy if dtype_is_common(dtype) => py
                .import(intern!(py, "cupy"))?
                .call_method1(intern!(py, "from_dlpack"), (Bound::new(py, view)?,)),
            Self::Numpy if place == Place::Host => View::numpy(&Bound::new(py, view)?),
            _ => Ok(Bound::new(py, view)?.into_any()),
        }
    }
}

/// Whether every framework has the type.
const fn dtype_is_common(dtype: DType) -> bool {
    !matches!(dtype, DType::BF16 | DType::F8E4M3 | DType::F8E5M2)
}
