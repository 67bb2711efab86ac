//! `View`: memory that arrays of any framework can be made over.

use std::any::Any;
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use unisono::{Place, RawBuffer};

use crate::{dlpack, dtype};

/// One rank's copy of a ``SymmetricMemory``, as memory for arrays: ``numpy.asarray(view)`` or ``view.numpy()`` on the host,
/// ``torch.from_dlpack(view)``, ``cupy.asarray(view)`` and others on either. Nothing is copied. Peers may read and write the memory at any
/// time; signals bring order.
///
/// Views of the host keep the memory mapped, also after ``close``. Memory of GPUs must not be used once it is closed.
///
/// >>> import unisono
/// >>> with unisono.Communicator.threads(1)[0] as rank:
/// ...     memory = rank.symmetric_memory((2, 3), "int32")
/// ...     view = memory.local
/// ...     view.numpy()[1] = 7
/// ...     view.shape, view.dtype, view.numpy().tolist()
/// ((2, 3), 'int32', [[0, 0, 0], [7, 7, 7]])
#[pyclass(frozen, module = "unisono")]
pub(crate) struct View {
    pub(crate) memory: RawBuffer,
    pub(crate) dimensions: Vec<usize>,
    /// What keeps memory of the host.
    pub(crate) mapping: Option<Arc<dyn Any + Send + Sync>>,
}

#[pymethods]
impl View {
    /// The sizes of its dimensions.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.dimensions)
    }

    /// The name of its elements' type, as numpy and ml_dtypes call it.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype::common_name(self.memory.dtype)
    }

    /// The address of its first element.
    #[getter]
    fn address(&self) -> u64 {
        self.memory.ptr
    }

    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.interface(py, false)
    }

    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.interface(py, true)
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        this: &Bound<'py, Self>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let me = this.get();
        // Nothing of ours is at work on it in any stream.
        drop(stream);
        if copy == Some(true) {
            return Err(PyBufferError::new_err(
                "a view is of memory where it lies; copy the array that is made of it",
            ));
        }
        if dl_device.is_some_and(|asked| asked != dlpack::device(me.memory.place)) {
            return Err(PyBufferError::new_err(format!("the memory lies in {}", me.memory.place)));
        }
        let is_versioned = max_version.is_some_and(|(major, _)| major >= 1);
        dlpack::give(this.clone().into_any(), &me.memory, &me.dimensions, is_versioned)
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        dlpack::device(self.memory.place)
    }

    /// An array of numpy over this memory, which must lie on the host. Types that numpy does not have are those of ml_dtypes.
    fn numpy<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let (py, me) = (this.py(), this.get());
        if me.memory.place != Place::Host {
            return Err(PyBufferError::new_err(format!("the memory lies in {}", me.memory.place)));
        }
        let numpy = py.import(intern!(py, "numpy"))?;
        if dtype::typestr(me.memory.dtype).is_some() {
            return numpy.call_method1("asarray", (this,));
        }
        let words = RawBuffer { dtype: words_like(me.memory.dtype), ..me.memory };
        let words = Self { memory: words, dimensions: me.dimensions.clone(), mapping: me.mapping.clone() };
        let named = py.import("ml_dtypes")?.getattr(me.dtype())?;
        numpy.call_method1("asarray", (words,))?.call_method1("view", (named,))
    }

    fn __repr__(&self) -> String {
        format!("<unisono.View {:?} {} in {}>", self.dimensions, self.dtype(), self.memory.place)
    }
}

impl View {
    fn interface<'py>(&self, py: Python<'py>, of_cuda: bool) -> PyResult<Bound<'py, PyDict>> {
        let is_on_device = matches!(self.memory.place, Place::Cuda { .. });
        let typestr = dtype::typestr(self.memory.dtype).filter(|_| is_on_device == of_cuda);
        let Some(typestr) = typestr else {
            let why = format!("{} in {} has no such interface; DLPack has", self.dtype(), self.memory.place);
            return Err(pyo3::exceptions::PyAttributeError::new_err(why));
        };
        let interface = PyDict::new(py);
        interface.set_item("typestr", typestr)?;
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("data", (self.memory.ptr, false))?;
        interface.set_item("strides", py.None())?;
        interface.set_item("version", 3)?;
        Ok(interface)
    }
}

/// Unsigned integers of the same size.
const fn words_like(dtype: unisono::DType) -> unisono::DType {
    match dtype.size() {
        1 => unisono::DType::U8,
        _ => unisono::DType::U16,
    }
}
