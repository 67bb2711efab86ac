//! Python's buffer protocol: how memory of numpy arrays, `bytearray`, `array.array` and others is reached without a copy.
//!
//! The limited interface of Python has it from 3.11 on only, but every Python 3 exports these functions, and the structure is the
//! same since 3.3 (in 3.11 it became a part of the stable interface as it was). So it is declared here, and one library serves 3.10 too.

use std::ffi::{CStr, c_char, c_int, c_void};

use pyo3::ffi;
use pyo3::prelude::*;

/// `Py_buffer`.
#[repr(C)]
struct RawView {
    buf: *mut c_void,
    obj: *mut ffi::PyObject,
    len: isize,
    itemsize: isize,
    readonly: c_int,
    ndim: c_int,
    format: *mut c_char,
    shape: *mut isize,
    strides: *mut isize,
    suboffsets: *mut isize,
    internal: *mut c_void,
}

const STRIDES: c_int = 0x10 | 0x08;
const FORMAT: c_int = 0x04;

unsafe extern "C" {
    fn PyObject_CheckBuffer(object: *mut ffi::PyObject) -> c_int;
    fn PyObject_GetBuffer(object: *mut ffi::PyObject, view: *mut RawView, flags: c_int) -> c_int;
    fn PyBuffer_Release(view: *mut RawView);
}

/// A view of an object's memory. While it is held, the object does not move or free that.
pub(crate) struct BufferView {
    /// Where it stays: exporters may keep pointers into it.
    raw: Box<RawView>,
}

// SAFETY: it is touched with the interpreter held, which any thread may hold.
unsafe impl Send for BufferView {}
// SAFETY: as above.
unsafe impl Sync for BufferView {}

impl BufferView {
    /// Whether `object` lends its memory.
    #[inline]
    pub(crate) fn is_lent_by(object: &Bound<'_, PyAny>) -> bool {
        // SAFETY: the object lives, and the interpreter is held.
        unsafe { PyObject_CheckBuffer(object.as_ptr()) == 1 }
    }

    /// The memory of `object`, with a format or (for types that no format can name) without.
    ///
    /// # Errors
    /// What the object refuses.
    #[inline]
    pub(crate) fn new(object: &Bound<'_, PyAny>, with_format: bool) -> PyResult<Self> {
        let flags = if with_format { STRIDES | FORMAT } else { STRIDES };
        let mut raw = Box::new(RawView {
            buf: std::ptr::null_mut(),
            obj: std::ptr::null_mut(),
            len: 0,
            itemsize: 0,
            readonly: 0,
            ndim: 0,
            format: std::ptr::null_mut(),
            shape: std::ptr::null_mut(),
            strides: std::ptr::null_mut(),
            suboffsets: std::ptr::null_mut(),
            internal: std::ptr::null_mut(),
        });
        // SAFETY: the object lives, the interpreter is held, and the structure is ours to fill.
        if unsafe { PyObject_GetBuffer(object.as_ptr(), &raw mut *raw, flags) } != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        Ok(Self { raw })
    }

    /// Where the memory begins.
    pub(crate) fn address(&self) -> u64 {
        self.raw.buf.expose_provenance() as u64
    }

    /// Bytes of all elements.
    pub(crate) const fn bytes(&self) -> usize {
        self.raw.len.cast_unsigned()
    }

    /// Bytes of one.
    pub(crate) const fn item_bytes(&self) -> usize {
        self.raw.itemsize.cast_unsigned()
    }

    /// Whether nobody may write to it.
    pub(crate) const fn is_readonly(&self) -> bool {
        self.raw.readonly != 0
    }

    /// The type of the elements, in the letters of the module `struct`; bytes if nothing is said.
    pub(crate) fn format(&self) -> &[u8] {
        if self.raw.format.is_null() {
            return b"B";
        }
        // SAFETY: the protocol says that it is a string, which lives as long as the view.
        unsafe { CStr::from_ptr(self.raw.format) }.to_bytes()
    }

    /// The strides in bytes, if the elements do not lie one after the other in the order of C.
    pub(crate) fn gaps(&self) -> Option<&[isize]> {
        let dimensions = usize::try_from(self.raw.ndim).unwrap_or(0);
        if dimensions == 0 || self.raw.strides.is_null() || self.raw.len == 0 {
            return None;
        }
        // SAFETY: the protocol says that both have so many numbers, and live as long as the view.
        let (shape, strides) = unsafe {
            (
                std::slice::from_raw_parts(self.raw.shape, dimensions),
                std::slice::from_raw_parts(self.raw.strides, dimensions),
            )
        };
        (!is_packed(shape, strides, self.raw.itemsize)).then_some(strides)
    }
}

impl Drop for BufferView {
    fn drop(&mut self) {
        Python::attach(|_| {
            // SAFETY: the view was filled by the exporter, and is released once.
            unsafe { PyBuffer_Release(&raw mut *self.raw) }
        });
    }
}

/// Whether elements with these strides (in the unit of `item`) lie one after the other in the order of C.
pub(crate) fn is_packed(shape: &[isize], strides: &[isize], item: isize) -> bool {
    let mut expected = item;
    for (size, stride) in shape.iter().zip(strides).rev() {
        if *size != 1 && *stride != expected {
            return false;
        }
        expected = expected.wrapping_mul(*size);
    }
    true
}

/// Elements of an array of `shape`, each of so many bytes; `None` if no memory has so many.
pub(crate) fn count(shape: &[isize], item_bytes: usize) -> Option<usize> {
    let sizes = shape.iter().map(|size| usize::try_from(*size).ok());
    let count = sizes.into_iter().try_fold(1usize, |count, size| count.checked_mul(size?))?;
    let bytes = count.checked_mul(item_bytes)?;
    isize::try_from(bytes).is_ok().then_some(count)
}
