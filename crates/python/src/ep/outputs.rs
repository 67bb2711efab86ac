//! Outputs as arrays of the framework that asked. An array owns its memory, which is given back when the last view of it dies.

use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use unisono::ep::Tensor;
use unisono::{DType, Place};

use crate::array::{imported, is_torch_tensor};
use crate::view::View;

/// Whose arrays a call was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Framework {
    Torch,
    Cupy,
    Numpy,
    /// One that is not known: it makes its arrays of a `View` itself.
    Other,
}

impl Framework {
    pub(super) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
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

    /// `tensor` as an array.
    pub(super) fn array(self, py: Python<'_>, tensor: Tensor) -> PyResult<Py<PyAny>> {
        let (memory, dimensions) = (tensor.raw(), tensor.shape().to_vec());
        let view = View { memory, dimensions, mapping: Some(Arc::new(tensor)) };
        Ok(self.over(py, view)?.unbind())
    }

    /// The same of what may be nothing.
    pub(super) fn array_of(self, py: Python<'_>, tensor: Option<Tensor>) -> PyResult<Option<Py<PyAny>>> {
        tensor.map(|tensor| self.array(py, tensor)).transpose()
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
