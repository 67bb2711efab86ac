//! Buffers as operations see them: a raw description (address, count, dtype, place) and, around it, a lifetime.

use std::marker::PhantomData;

use unisono_core::{DType, Element};

/// Where a buffer lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Place {
    /// Ordinary memory of this process.
    Host,
    /// Inside the window with this id.
    Window {
        /// The window's id, equal on all ranks.
        id: u64,
    },
    /// Memory of the GPU with this ordinal.
    Cuda {
        /// The device's ordinal in this process.
        ordinal: u32,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => write!(f, "host memory"),
            Self::Window { id } => write!(f, "window {id}"),
            Self::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A buffer without a lifetime: what all algorithms work on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RawBuffer {
    /// Address of the first element.
    pub ptr: u64,
    /// Number of elements.
    pub count: usize,
    /// Their type.
    pub dtype: DType,
    /// Where they lie.
    pub place: Place,
}

impl RawBuffer {
    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.count * self.dtype.size()
    }
}

/// A borrowed input of `T`: made from slices, vectors, arrays and windows.
#[derive(Clone, Copy, Debug)]
pub struct Buf<'b, T> {
    raw: RawBuffer,
    life: PhantomData<&'b [T]>,
}

/// A borrowed output, or input and output, of `T`: made from mutable slices, vectors, arrays and windows.
#[derive(Debug)]
pub struct BufMut<'b, T> {
    raw: RawBuffer,
    life: PhantomData<&'b mut [T]>,
}

impl<'b, T: Element> Buf<'b, T> {
    pub(crate) const fn new(raw: RawBuffer) -> Self {
        Self { raw, life: PhantomData }
    }

    /// The description.
    pub const fn raw(&self) -> RawBuffer {
        self.raw
    }
}

impl<'b, T: Element> BufMut<'b, T> {
    pub(crate) const fn new(raw: RawBuffer) -> Self {
        Self { raw, life: PhantomData }
    }

    /// The description.
    pub const fn raw(&self) -> RawBuffer {
        self.raw
    }
}

impl<T: Element> Buf<'_, T> {
    /// `count` elements at address `ptr` of device `ordinal` of this process, as an input.
    ///
    /// # Safety
    /// They are valid, aligned to their type, and written by nobody until the stream of the operation has passed it (not:
    /// until the call returns).
    pub const unsafe fn cuda(ptr: u64, count: usize, ordinal: u32) -> Self {
        Self::new(RawBuffer { ptr, count, dtype: T::DTYPE, place: Place::Cuda { ordinal } })
    }
}

impl<T: Element> Buf<'_, T> {
    /// What `raw` describes, as an input; `None` if it is of another type. For bindings to other languages.
    ///
    /// # Safety
    /// As [`Call::from_raw`](crate::Call::from_raw).
    pub unsafe fn from_raw(raw: RawBuffer) -> Option<Self> {
        (raw.dtype == T::DTYPE).then_some(Self::new(raw))
    }
}

impl<T: Element> BufMut<'_, T> {
    /// `count` elements at address `ptr` of device `ordinal` of this process, as an output, or input and output.
    ///
    /// # Safety
    /// They are valid, aligned to their type, and touched by nobody else until the stream of the operation has passed it (not:
    /// until the call returns).
    pub const unsafe fn cuda(ptr: u64, count: usize, ordinal: u32) -> Self {
        Self::new(RawBuffer { ptr, count, dtype: T::DTYPE, place: Place::Cuda { ordinal } })
    }
}

fn host<T: Element>(ptr: *const T, count: usize) -> RawBuffer {
    RawBuffer { ptr: ptr.expose_provenance() as u64, count, dtype: T::DTYPE, place: Place::Host }
}

impl<'b, T: Element> From<&'b [T]> for Buf<'b, T> {
    fn from(slice: &'b [T]) -> Self {
        Self::new(host(slice.as_ptr(), slice.len()))
    }
}

impl<'b, T: Element> From<&'b Vec<T>> for Buf<'b, T> {
    fn from(vec: &'b Vec<T>) -> Self {
        vec.as_slice().into()
    }
}

impl<'b, T: Element, const N: usize> From<&'b [T; N]> for Buf<'b, T> {
    fn from(array: &'b [T; N]) -> Self {
        array.as_slice().into()
    }
}

impl<'b, T: Element> From<&'b mut [T]> for BufMut<'b, T> {
    fn from(slice: &'b mut [T]) -> Self {
        Self::new(host(slice.as_mut_ptr(), slice.len()))
    }
}

impl<'b, T: Element> From<&'b mut Vec<T>> for BufMut<'b, T> {
    fn from(vec: &'b mut Vec<T>) -> Self {
        vec.as_mut_slice().into()
    }
}

impl<'b, T: Element, const N: usize> From<&'b mut [T; N]> for BufMut<'b, T> {
    fn from(array: &'b mut [T; N]) -> Self {
        array.as_mut_slice().into()
    }
}
