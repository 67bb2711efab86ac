//! DLPack: how arrays go between frameworks, in both directions, without a copy. <https://dmlc.github.io/dlpack>
//!
//! Producers give a capsule with a tensor, of version 1 if they are asked for that and know it; who takes it renames the capsule and
//! calls the tensor's deleter in the end.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use unisono::{DType, Place, RawBuffer};

use crate::dtype;

/// Memory of the host, of a GPU, pinned memory of the host, and memory that host and GPU share.
const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;
const CUDA_MANAGED: i32 = 13;

const OLD: &CStr = c"dltensor";
const OLD_USED: &CStr = c"used_dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const VERSIONED_USED: &CStr = c"used_dltensor_versioned";
const READ_ONLY: u64 = 1;

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

#[repr(C)]
struct ManagedVersioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: Tensor,
}

/// A tensor that a producer gave. Dropping it gives it back.
pub(crate) enum Taken {
    Old(NonNull<c_void>),
    Versioned(NonNull<c_void>),
}

// SAFETY: the deleter may be called from any thread, with the interpreter held.
unsafe impl Send for Taken {}
// SAFETY: nothing of it is touched through a shared reference.
unsafe impl Sync for Taken {}

/// What a tensor says of itself.
pub(crate) struct Facts {
    /// `None` for devices that we do not know.
    pub(crate) place: Option<Place>,
    pub(crate) device: (i32, i32),
    /// `None` for types that we do not know: code, bits and lanes.
    pub(crate) dtype: Result<DType, (u8, u8, u16)>,
    pub(crate) address: u64,
    pub(crate) shape: Vec<isize>,
    pub(crate) is_packed: bool,
    pub(crate) is_readonly: bool,
}

/// Takes the tensor of `object`; its memory may be used in the order of the CUDA stream `stream`, if it lies on a GPU.
///
/// # Errors
/// What the producer refuses.
pub(crate) fn take(object: &Bound<'_, PyAny>, stream: Option<u64>) -> PyResult<(Taken, Facts)> {
    let py = object.py();
    let options = PyDict::new(py);
    if let Some(stream) = stream {
        // 0 is not allowed; 1 is the default stream.
        options.set_item(intern!(py, "stream"), stream.max(1))?;
    }
    options.set_item(intern!(py, "max_version"), (1, 0))?;
    let method = object.getattr(intern!(py, "__dlpack__"))?;
    let capsule = match method.call((), Some(&options)) {
        Err(error) if error.is_instance_of::<PyTypeError>(py) => {
            options.del_item(intern!(py, "max_version"))?;
            method.call((), Some(&options))?
        }
        result => result?,
    };
    let capsule =
        capsule.cast_into::<PyCapsule>().map_err(|_| PyTypeError::new_err("__dlpack__ gave no capsule"))?;
    if let Ok(pointer) = capsule.pointer_checked(Some(VERSIONED)) {
        rename(&capsule, VERSIONED_USED)?;
        let taken = Taken::Versioned(pointer);
        // SAFETY: a capsule of this name holds such a structure, which is ours until its deleter is called.
        let managed = unsafe { &*pointer.as_ptr().cast::<ManagedVersioned>() };
        if managed.major != 1 {
            return Err(PyBufferError::new_err(format!(
                "DLPack {}.{} is not known",
                managed.major, managed.minor
            )));
        }
        let facts = facts(&managed.tensor, managed.flags & READ_ONLY != 0);
        return Ok((taken, facts));
    }
    let pointer = capsule.pointer_checked(Some(OLD))?;
    rename(&capsule, OLD_USED)?;
    // SAFETY: as above.
    let managed = unsafe { &*pointer.as_ptr().cast::<Managed>() };
    Ok((Taken::Old(pointer), facts(&managed.tensor, false)))
}

/// From now on the tensor is ours.
fn rename(capsule: &Bound<'_, PyCapsule>, name: &'static CStr) -> PyResult<()> {
    // SAFETY: it is a capsule, and the name lives for ever.
    match unsafe { ffi::PyCapsule_SetName(capsule.as_ptr(), name.as_ptr()) } {
        0 => Ok(()),
        _ => Err(PyErr::fetch(capsule.py())),
    }
}

fn facts(tensor: &Tensor, is_readonly: bool) -> Facts {
    let dimensions = usize::try_from(tensor.ndim).unwrap_or(0);
    let numbers = |from: *mut i64| -> Vec<isize> {
        if from.is_null() || dimensions == 0 {
            return Vec::new();
        }
        // SAFETY: a tensor has so many numbers there.
        unsafe { std::slice::from_raw_parts(from, dimensions) }
            .iter()
            .map(|number| *number as isize)
            .collect()
    };
    let (shape, strides) = (numbers(tensor.shape), numbers(tensor.strides));
    let is_packed = strides.is_empty() || crate::buffer::is_packed(&shape, &strides, 1);
    let place = match tensor.device_type {
        CPU | CUDA_HOST => Some(Place::Host),
        CUDA | CUDA_MANAGED => Some(Place::Cuda { ordinal: tensor.device_id.cast_unsigned() }),
        _ => None,
    };
    let dtype = dtype::of_dlpack(tensor.code, tensor.bits).filter(|_| tensor.lanes == 1);
    Facts {
        place,
        device: (tensor.device_type, tensor.device_id),
        dtype: dtype.ok_or((tensor.code, tensor.bits, tensor.lanes)),
        address: (tensor.data.expose_provenance() as u64).wrapping_add(tensor.byte_offset),
        shape,
        is_packed,
        is_readonly,
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        Python::attach(|_| {
            // SAFETY: the structure was handed to us with its deleter, which is called once; deleters of tensors that come from
            // Python expect the interpreter.
            unsafe {
                match self {
                    Self::Old(pointer) => {
                        let managed = pointer.as_ptr().cast::<Managed>();
                        if let Some(deleter) = (*managed).deleter {
                            deleter(managed);
                        }
                    }
                    Self::Versioned(pointer) => {
                        let managed = pointer.as_ptr().cast::<ManagedVersioned>();
                        if let Some(deleter) = (*managed).deleter {
                            deleter(managed);
                        }
                    }
                }
            }
        });
    }
}

/// The device of memory that is given, as DLPack numbers it.
pub(crate) const fn device(place: Place) -> (i32, i32) {
    match place {
        Place::Cuda { ordinal } => (CUDA, ordinal.cast_signed()),
        _ => (CPU, 0),
    }
}

/// What keeps memory that was given, with the numbers that its tensor points to.
struct Given {
    _owner: Py<PyAny>,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

/// A capsule with a tensor of `shape` over `memory`, which `owner` keeps.
pub(crate) fn give<'py>(
    owner: Bound<'py, PyAny>,
    memory: &RawBuffer,
    shape: &[usize],
    is_versioned: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let py = owner.py();
    let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
    let mut strides = vec![1; shape.len()];
    for at in (1..shape.len()).rev() {
        strides[at - 1] = strides[at] * shape[at].max(1);
    }
    let mut given = Box::new(Given { _owner: owner.unbind(), shape, strides });
    let (code, bits) = dtype::dlpack(memory.dtype);
    let (device_type, device_id) = device(memory.place);
    let tensor = Tensor {
        data: std::ptr::with_exposed_provenance_mut(memory.ptr as usize),
        device_type,
        device_id,
        ndim: given.shape.len() as i32,
        code,
        bits,
        lanes: 1,
        shape: given.shape.as_mut_ptr(),
        strides: given.strides.as_mut_ptr(),
        byte_offset: 0,
    };
    let context = Box::into_raw(given).cast();
    let (pointer, name): (*mut c_void, _) = if is_versioned {
        let deleter = Some(end_versioned as unsafe extern "C" fn(_));
        let managed = ManagedVersioned { major: 1, minor: 0, context, deleter, flags: 0, tensor };
        (Box::into_raw(Box::new(managed)).cast(), VERSIONED)
    } else {
        let managed = Managed { tensor, context, deleter: Some(end_old as unsafe extern "C" fn(_)) };
        (Box::into_raw(Box::new(managed)).cast(), OLD)
    };
    // SAFETY: the pointer is not null, and the name lives for ever; the destructor looks at the name first.
    unsafe {
        let capsule = ffi::PyCapsule_New(pointer, name.as_ptr(), Some(end_of_capsule));
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

/// A capsule that nobody took gives its tensor back.
unsafe extern "C" fn end_of_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with the capsule, whose name tells what it holds and whether somebody took it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, OLD.as_ptr()) == 1 {
            end_old(ffi::PyCapsule_GetPointer(capsule, OLD.as_ptr()).cast());
        } else if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            end_versioned(ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast());
        }
    }
}

unsafe extern "C" fn end_old(managed: *mut Managed) {
    // SAFETY: both boxes were made by `give`, and this is called once.
    unsafe {
        drop(Box::from_raw((*managed).context.cast::<Given>()));
        drop(Box::from_raw(managed));
    }
}

unsafe extern "C" fn end_versioned(managed: *mut ManagedVersioned) {
    // SAFETY: as above.
    unsafe {
        drop(Box::from_raw((*managed).context.cast::<Given>()));
        drop(Box::from_raw(managed));
    }
}
