//! Arrays of any framework as memory: address, count, type and place, without a copy and without importing anything.
//!
//! Tried in this order: the buffer protocol (numpy and all that lends memory of the host), tensors of torch, the CUDA array interface
//! (cupy, numba), DLPack (jax and others), the array interface. What does not fit is refused with the rank and the argument named,
//! before anything is sent or written.

use parking_lot::Mutex;
use pyo3::exceptions::PyAttributeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};
use unisono::{DType, Place, RawBuffer};

use crate::buffer::{self, BufferView, is_packed};
use crate::dlpack::{self, Taken};
use crate::{dtype, errors};

/// Where an array was given, for messages.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    pub(crate) call: &'static str,
    pub(crate) rank: usize,
    pub(crate) what: &'static str,
}

/// The memory of an array.
pub(crate) struct Array {
    pub(crate) memory: RawBuffer,
    pub(crate) is_readonly: bool,
    /// The stream in whose order it may be used.
    pub(crate) stream: StreamOf,
    /// What keeps the memory where it is, besides the array itself.
    pub(crate) guard: Guard,
}

/// Whose current stream an array belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StreamOf {
    /// That of torch.
    Torch,
    /// This one, which its interface names.
    Named(u64),
    /// Nobody said.
    Unknown,
}

/// What is given back when an operation is done with an array.
#[expect(dead_code, reason = "held for their life")]
pub(crate) enum Guard {
    None,
    View(BufferView),
    Tensor(Taken),
}

impl Site {
    /// The error of an array that does not fit.
    pub(crate) fn refuse(self, py: Python<'_>, expected: impl Into<String>, got: impl Into<String>) -> PyErr {
        errors::argument(py, self.call, self.rank, self.what, expected, got)
    }

    fn refuse_dtype(self, py: Python<'_>, got: impl std::fmt::Display) -> PyErr {
        let names = DType::ALL.map(DType::name).join(", ");
        self.refuse(
            py,
            format!("of one of the types {names}, in this machine's byte order"),
            format!("{got}"),
        )
    }

    fn refuse_shape(self, py: Python<'_>, shape: &[isize]) -> PyErr {
        self.refuse(py, "of a shape that memory can have", format!("{shape:?}"))
    }

    fn refuse_gaps(self, py: Python<'_>, got: impl std::fmt::Display) -> PyErr {
        self.refuse(py, "contiguous (in the order of C)", format!("{got}"))
    }
}

impl Array {
    /// The memory of `object`, given at `site`; to be used in the order of the CUDA stream `stream`, if that is given.
    ///
    /// # Errors
    /// `ArgumentError` if it is no array, of a type that does not travel, or not contiguous.
    #[inline]
    pub(crate) fn new(object: &Bound<'_, PyAny>, site: Site, stream: Option<u64>) -> PyResult<Self> {
        if BufferView::is_lent_by(object) {
            return Self::lent(object, site);
        }
        Self::of_framework(object, site, stream)
    }

    /// By the buffer protocol.
    #[inline]
    fn lent(object: &Bound<'_, PyAny>, site: Site) -> PyResult<Self> {
        let py = object.py();
        let (view, dtype) = match BufferView::new(object, true) {
            Ok(view) => {
                let dtype = dtype::of_format(view.format(), view.item_bytes());
                (view, dtype)
            }
            // No format names types like bf16; their own name does.
            Err(refused) => match dtype_by_name(object)? {
                None => {
                    return Err(site.refuse(py, "an array", format!("{} ({refused})", type_name(object))));
                }
                Some(Err(name)) => return Err(site.refuse_dtype(py, name)),
                Some(Ok(dtype)) => return Self::unnamed(object, dtype, site),
            },
        };
        let Some(dtype) = dtype else {
            let named = dtype_by_name(object)?.and_then(Result::err);
            let got = named.unwrap_or_else(|| String::from_utf8_lossy(view.format()).into_owned());
            return Err(site.refuse_dtype(py, got));
        };
        if let Some(strides) = view.gaps() {
            return Err(site.refuse_gaps(py, format_args!("strides of {strides:?} bytes")));
        }
        let count = view.bytes() / dtype.size();
        let memory = RawBuffer { ptr: view.address(), count, dtype, place: Place::Host };
        let is_readonly = view.is_readonly();
        Ok(Self { memory, is_readonly, stream: StreamOf::Unknown, guard: Guard::View(view) })
    }

    /// By the buffer protocol, of a type that it cannot name.
    fn unnamed(object: &Bound<'_, PyAny>, dtype: DType, site: Site) -> PyResult<Self> {
        let Ok(view) = BufferView::new(object, false) else {
            return match object.getattr_opt(intern!(object.py(), "__array_interface__"))? {
                Some(interface) => Self::described(&interface, Some(dtype), Place::Host, site),
                None => Self::of_framework(object, site, None),
            };
        };
        if let Some(strides) = view.gaps() {
            return Err(site.refuse_gaps(object.py(), format_args!("strides of {strides:?} bytes")));
        }
        let count = view.bytes() / dtype.size();
        let memory = RawBuffer { ptr: view.address(), count, dtype, place: Place::Host };
        let is_readonly = view.is_readonly();
        Ok(Self { memory, is_readonly, stream: StreamOf::Unknown, guard: Guard::View(view) })
    }

    fn of_framework(object: &Bound<'_, PyAny>, site: Site, stream: Option<u64>) -> PyResult<Self> {
        let py = object.py();
        if is_torch_tensor(object)? {
            return Self::of_torch(object, site);
        }
        // Frameworks raise what they like where an array lies elsewhere.
        if let Ok(interface) = object.getattr(intern!(py, "__cuda_array_interface__")) {
            let place = Place::Cuda { ordinal: ordinal_of(object)? };
            return Self::described(&interface, None, place, site);
        }
        if object.hasattr(intern!(py, "__dlpack__"))? {
            let (type_, _): (i32, i32) = object.call_method0(intern!(py, "__dlpack_device__"))?.extract()?;
            let stream = (type_ != 1).then(|| stream.unwrap_or(0));
            let (taken, facts) = dlpack::take(object, stream)?;
            let Some(place) = facts.place else {
                let got = format!("memory of DLPack's device {:?}", facts.device);
                return Err(site.refuse(py, "in memory of the host or of a CUDA device", got));
            };
            let dtype = facts.dtype.map_err(|(code, bits, lanes)| {
                site.refuse_dtype(py, format_args!("DLPack's type {code} of {bits} bits and {lanes} lanes"))
            })?;
            let Some(count) = buffer::count(&facts.shape, dtype.size()) else {
                return Err(site.refuse_shape(py, &facts.shape));
            };
            if count > 0 && !facts.is_packed {
                return Err(site.refuse_gaps(py, "an array with gaps"));
            }
            let memory = RawBuffer { ptr: facts.address, count, dtype, place };
            let guard = Guard::Tensor(taken);
            return Ok(Self { memory, is_readonly: facts.is_readonly, stream: StreamOf::Unknown, guard });
        }
        if let Some(interface) = object.getattr_opt(intern!(py, "__array_interface__"))? {
            return Self::described(&interface, None, Place::Host, site);
        }
        let expected = "an array: with the buffer protocol, __dlpack__ or __cuda_array_interface__";
        Err(site.refuse(py, expected, type_name(object)))
    }

    /// By the interface of a dictionary: `__cuda_array_interface__` or `__array_interface__`.
    fn described(
        interface: &Bound<'_, PyAny>,
        dtype: Option<DType>,
        place: Place,
        site: Site,
    ) -> PyResult<Self> {
        let py = interface.py();
        let interface = interface.cast::<PyDict>()?;
        let item = |name| PyResult::Ok(interface.get_item(name)?.filter(|item| !item.is_none()));
        let need = |name| {
            let missing = || site.refuse(py, "an array with a whole interface", "one without it");
            item(name)?.ok_or_else(missing)
        };
        let typestr: String = need(intern!(py, "typestr"))?.extract()?;
        let Some(dtype) = dtype.or_else(|| dtype::of_typestr(&typestr)) else {
            return Err(site.refuse_dtype(py, typestr));
        };
        let shape: Vec<isize> = need(intern!(py, "shape"))?.extract()?;
        let (ptr, is_readonly): (u64, bool) = need(intern!(py, "data"))?.extract()?;
        let Some(count) = buffer::count(&shape, dtype.size()) else {
            return Err(site.refuse_shape(py, &shape));
        };
        if let Some(strides) = item(intern!(py, "strides"))? {
            let strides: Vec<isize> = strides.extract()?;
            if strides.len() != shape.len()
                || count > 0 && !is_packed(&shape, &strides, dtype.size().cast_signed())
            {
                return Err(site.refuse_gaps(py, format_args!("strides of {strides:?} bytes")));
            }
        }
        let stream = item(intern!(py, "stream"))?.map(|stream| stream.extract()).transpose()?;
        let memory = RawBuffer { ptr, count, dtype, place };
        let stream = stream.map_or(StreamOf::Unknown, StreamOf::Named);
        Ok(Self { memory, is_readonly, stream, guard: Guard::None })
    }

    /// A tensor of torch: its methods are quicker than any protocol, and go for tensors that require a gradient too.
    fn of_torch(object: &Bound<'_, PyAny>, site: Site) -> PyResult<Self> {
        let py = object.py();
        let dtype = torch_dtype(&object.getattr(intern!(py, "dtype"))?)?;
        let dtype = dtype.map_err(|name| site.refuse_dtype(py, name))?;
        let is = |name| object.call_method0(name)?.is_truthy();
        if object.getattr(intern!(py, "is_sparse"))?.is_truthy()? {
            return Err(site.refuse(py, "dense", "a sparse tensor"));
        }
        if !is(intern!(py, "is_contiguous"))? {
            let strides = object.call_method0(intern!(py, "stride"))?;
            return Err(site.refuse_gaps(py, format_args!("strides of {strides} elements")));
        }
        if dtype.is_complex() && is(intern!(py, "is_conj"))? {
            return Err(site.refuse(
                py,
                "a tensor as it lies in memory",
                "a conjugate that was not resolved (resolve_conj)",
            ));
        }
        let ordinal: i32 = object.call_method0(intern!(py, "get_device"))?.extract()?;
        let place = match u32::try_from(ordinal) {
            Err(_) if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? => Place::Host,
            Ok(ordinal) if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? => Place::Cuda { ordinal },
            _ => {
                let device = object.getattr(intern!(py, "device"))?;
                return Err(site.refuse(
                    py,
                    "in memory of the host or of a CUDA device",
                    format!("a tensor on {device}"),
                ));
            }
        };
        let count = object.call_method0(intern!(py, "numel"))?.extract()?;
        let ptr = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let memory = RawBuffer { ptr, count, dtype, place };
        let stream = if place == Place::Host { StreamOf::Unknown } else { StreamOf::Torch };
        Ok(Self { memory, is_readonly: false, stream, guard: Guard::None })
    }
}

fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "something else".to_owned(), |name| name.to_string())
}

/// Whether it is a tensor of torch, or of a class derived from it.
fn is_torch_tensor(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = object.py();
    let Some(torch) = imported(py, intern!(py, "torch"))? else { return Ok(false) };
    match torch.getattr_opt(intern!(py, "Tensor"))? {
        Some(tensor) => object.is_instance(&tensor),
        None => Ok(false),
    }
}

/// A module, if somebody has imported it.
pub(crate) fn imported<'py>(
    py: Python<'py>,
    name: &Bound<'py, PyString>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    static MODULES: pyo3::sync::PyOnceLock<Py<PyDict>> = pyo3::sync::PyOnceLock::new();
    let modules = MODULES.get_or_try_init(py, || {
        let modules = py.import("sys")?.getattr("modules")?;
        PyResult::Ok(modules.cast_into::<PyDict>()?.unbind())
    })?;
    Ok(modules.bind(py).get_item(name)?.filter(|module| !module.is_none()))
}

/// By the name of the dtype of `object`, which may be one that does not travel; `None` if it has no dtype.
fn dtype_by_name(object: &Bound<'_, PyAny>) -> PyResult<Option<Result<DType, String>>> {
    let py = object.py();
    let Some(dtype) = object.getattr_opt(intern!(py, "dtype"))? else { return Ok(None) };
    let is_swapped = match dtype.getattr_opt(intern!(py, "byteorder"))? {
        Some(order) => order.eq(">")?,
        None => false,
    };
    let name = dtype.str()?.to_string();
    let known = if is_swapped { None } else { dtype::of_name(&name) };
    Ok(Some(known.ok_or(name)))
}

/// The types of torch are objects of which there is one each.
fn torch_dtype(dtype: &Bound<'_, PyAny>) -> PyResult<Result<DType, String>> {
    static KNOWN: Mutex<Vec<(Py<PyAny>, DType)>> = Mutex::new(Vec::new());
    if let Some((_, known)) = KNOWN.lock().iter().find(|(known, _)| known.is(dtype)) {
        return Ok(Ok(*known));
    }
    let name = dtype.str()?.to_string();
    let Some(known) = dtype::of_name(name.trim_start_matches("torch.")) else { return Ok(Err(name)) };
    KNOWN.lock().push((dtype.clone().unbind(), known));
    Ok(Ok(known))
}

/// The device of an array with a CUDA array interface, which does not tell it: as DLPack does, or as cupy's `device`.
fn ordinal_of(object: &Bound<'_, PyAny>) -> PyResult<u32> {
    let py = object.py();
    if let Some(device) = object.getattr_opt(intern!(py, "__dlpack_device__"))? {
        let device = device.call0()?;
        return device.cast::<PyTuple>()?.get_item(1)?.extract();
    }
    match object.getattr_opt(intern!(py, "device"))? {
        Some(device) => device.getattr(intern!(py, "id"))?.extract(),
        None => {
            Err(PyAttributeError::new_err("an array on a GPU should tell its device by __dlpack_device__"))
        }
    }
}
