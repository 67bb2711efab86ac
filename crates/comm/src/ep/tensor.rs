//! What expert-parallel operations take and give: borrowed memory with its type, and tensors of their own.

use std::marker::PhantomData;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use unisono_core::{DType, Element};

use crate::buffer::{Buf, Place, RawBuffer};
use crate::error::{Error, Result};
use crate::stream::Stream;

/// A borrowed input of any element type: made from slices, vectors, arrays, [`Buf`]s and [`Tensor`]s.
#[derive(Clone, Copy, Debug)]
pub struct Input<'b> {
    raw: RawBuffer,
    life: PhantomData<&'b ()>,
}

impl<'b> Input<'b> {
    /// What `raw` describes. For bindings to other languages.
    ///
    /// # Safety
    /// As [`Call::from_raw`](crate::Call::from_raw).
    pub const unsafe fn from_raw(raw: RawBuffer) -> Self {
        Self { raw, life: PhantomData }
    }

    /// The description.
    pub const fn raw(&self) -> RawBuffer {
        self.raw
    }

    /// Where it lies, if that is `place`, where its buffer works.
    pub(super) fn lent(&self, (call, rank, place): (&'static str, usize, Place)) -> Result<Lent<'b>> {
        if self.raw.place != place {
            let (expected, got) = (place.to_string(), self.raw.place.to_string());
            return Err(Error::Place { call, rank, expected, got });
        }
        if place != Place::Host {
            return Ok(Lent { address: self.raw.ptr, bytes: &[] });
        }
        if self.raw.count == 0 {
            // Other languages may give any address then.
            return Ok(Lent { address: self.raw.ptr, bytes: &[] });
        }
        let start = std::ptr::with_exposed_provenance(self.raw.ptr as usize);
        // SAFETY: it was made from a borrow of `'b` of so many elements, which have no padding.
        let bytes = unsafe { std::slice::from_raw_parts(start, self.raw.bytes()) };
        Ok(Lent { address: self.raw.ptr, bytes })
    }
}

/// An input that was checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lent<'b> {
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the host has the bytes"))]
    pub(super) address: u64,
    /// Empty on a GPU.
    pub(super) bytes: &'b [u8],
}

impl<'b, T: Element> From<Buf<'b, T>> for Input<'b> {
    fn from(buffer: Buf<'b, T>) -> Self {
        Self { raw: buffer.raw(), life: PhantomData }
    }
}

impl<'b, T: Element> From<&'b [T]> for Input<'b> {
    fn from(slice: &'b [T]) -> Self {
        Buf::from(slice).into()
    }
}

impl<'b, T: Element> From<&'b Vec<T>> for Input<'b> {
    fn from(vec: &'b Vec<T>) -> Self {
        vec.as_slice().into()
    }
}

impl<'b, T: Element, const N: usize> From<&'b [T; N]> for Input<'b> {
    fn from(array: &'b [T; N]) -> Self {
        array.as_slice().into()
    }
}

impl<'b> From<&'b Tensor> for Input<'b> {
    fn from(tensor: &'b Tensor) -> Self {
        Self { raw: tensor.raw(), life: PhantomData }
    }
}

/// An output: elements of one type, row-major, in the memory that its buffer works on: the host's, or that of its GPU. Outputs of different calls
/// never alias.
///
/// On a GPU what a call gives is there in the order of the stream of the call. It may be used on that stream; on another one, in an order that
/// the user sees to, after [`Tensor::use_on`]. When the last clone is dropped, its memory goes to later calls, behind the work that these
/// streams have then. Clones are the same memory. What a captured call gives is the same memory in every launch of the graph.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor {
    memory: Memory,
    dtype: DType,
    shape: Vec<usize>,
}

#[derive(Clone, PartialEq, Debug)]
enum Memory {
    /// Words, so that every element is aligned.
    Host(Vec<u64>),
    /// From byte `at` of a slab.
    #[cfg(feature = "cuda")]
    Device { slab: Arc<super::gpu::Memory>, at: usize },
}

impl Tensor {
    /// Zeros.
    pub(super) fn zeros(dtype: DType, shape: &[usize]) -> Self {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Self { memory: Memory::Host(vec![0; bytes.div_ceil(8)]), dtype, shape: shape.to_vec() }
    }

    /// What lies at byte `at` of `slab`.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(
        slab: &Arc<super::gpu::Memory>,
        at: usize,
        dtype: DType,
        shape: &[usize],
    ) -> Self {
        Self { memory: Memory::Device { slab: slab.clone(), at }, dtype, shape: shape.to_vec() }
    }

    pub(super) fn of<T: Element>(elements: &[T], shape: &[usize]) -> Self {
        let mut tensor = Self::zeros(T::DTYPE, shape);
        tensor.bytes_mut().copy_from_slice(bytes_of(elements));
        tensor
    }

    /// The type of its elements.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its dimensions, the last one contiguous.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements.
    ///
    /// # Errors
    /// [`Error::Core`] if they are of another type; [`Error::Place`] if they lie on a GPU.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.check_type("as_slice", T::DTYPE)?;
        // SAFETY: the bytes are so many elements, aligned for all of them, and every bit pattern is a `T`.
        Ok(unsafe { std::slice::from_raw_parts(self.bytes().as_ptr().cast(), self.len()) })
    }

    /// Its elements, to be changed.
    ///
    /// # Errors
    /// As [`Tensor::as_slice`].
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.check_type("as_mut_slice", T::DTYPE)?;
        let count = self.len();
        // SAFETY: as above; a `T` has no padding, so the bytes stay initialised.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.bytes_mut().as_mut_ptr().cast(), count) })
    }

    /// The description: for bindings to other languages, and kernels of one's own.
    pub fn raw(&self) -> RawBuffer {
        let (ptr, place) = match &self.memory {
            Memory::Host(words) => (words.as_ptr().expose_provenance() as u64, Place::Host),
            #[cfg(feature = "cuda")]
            Memory::Device { slab, at } => {
                (slab.address() + *at as u64, Place::Cuda { ordinal: slab.core().ordinal() })
            }
        };
        RawBuffer { ptr, count: self.len(), dtype: self.dtype, place }
    }

    /// A copy on the host, of what is there behind the work that `stream` has now; waits for that. On the host it is a clone.
    ///
    /// # Errors
    /// [`Error::Cuda`] if that work failed; [`Error::Place`] if it lies on a GPU and the stream is the host's.
    pub fn to_host(&self, stream: &Stream) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Memory::Device { slab, .. } = &self.memory {
            let Some(stream) = stream.as_cuda() else {
                let (expected, got) =
                    (format!("a stream of {}", self.raw().place), "the host's stream".to_owned());
                return Err(Error::Place { call: "to_host", rank: slab.core().rank(), expected, got });
            };
            let mut copy = Self::zeros(self.dtype, &self.shape);
            // SAFETY: the slab is so long, and the stream is waited for.
            unsafe { stream.read(self.raw().ptr, copy.bytes_mut()) }
                .map_err(|error| Error::Cuda { rank: slab.core().rank(), error })?;
            return Ok(copy);
        }
        let _ = stream;
        Ok(self.clone())
    }

    /// From now on work of `stream` may touch it, too: its memory goes to later calls only behind the work that this stream has when the
    /// last clone is dropped. Nothing on the host.
    pub fn use_on(&self, stream: &Stream) {
        #[cfg(feature = "cuda")]
        if let (Memory::Device { slab, .. }, Some(stream)) = (&self.memory, stream.as_cuda()) {
            slab.use_on(stream);
        }
        let _ = stream;
    }

    /// Those of one on the host.
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.memory {
            // SAFETY: the words hold so many bytes.
            Memory::Host(words) => unsafe {
                std::slice::from_raw_parts(words.as_ptr().cast(), self.len() * self.dtype.size())
            },
            #[cfg(feature = "cuda")]
            Memory::Device { .. } => unreachable!("bytes of a GPU"),
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.len() * self.dtype.size();
        match &mut self.memory {
            // SAFETY: as above; any byte may be written.
            Memory::Host(words) => unsafe {
                std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), bytes)
            },
            #[cfg(feature = "cuda")]
            Memory::Device { .. } => unreachable!("bytes of a GPU"),
        }
    }

    /// Bytes of one row: of everything behind the first dimension.
    pub(super) fn row_bytes(&self) -> usize {
        self.shape[1..].iter().product::<usize>() * self.dtype.size()
    }

    /// Takes out the rows from `start` to `end`; those behind move up.
    pub(super) fn remove_rows(&mut self, start: usize, end: usize) {
        let row = self.row_bytes();
        self.bytes_mut().copy_within(end * row.., start * row);
        self.shape[0] -= end - start;
    }

    /// Appends rows of zeros until there are `rows`.
    pub(super) fn extend_rows(&mut self, rows: usize) {
        let before = self.bytes().len();
        self.shape[0] = rows;
        let after = self.len() * self.dtype.size();
        match &mut self.memory {
            Memory::Host(words) => words.resize(after.div_ceil(8), 0),
            #[cfg(feature = "cuda")]
            Memory::Device { .. } => unreachable!("rows of a GPU"),
        }
        self.bytes_mut()[before..].fill(0);
    }

    fn check_type(&self, call: &'static str, asked: DType) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Memory::Device { slab, .. } = &self.memory {
            let (expected, got) = ("host memory".to_owned(), self.raw().place.to_string());
            return Err(Error::Place { call, rank: slab.core().rank(), expected, got });
        }
        let _ = call;
        if self.dtype == asked {
            return Ok(());
        }
        let (expected, got) = (self.dtype.to_string(), asked.to_string());
        Err(unisono_core::Error::Malformed { what: "element type of a tensor", expected, got }.into())
    }
}

/// Elements as bytes.
pub(super) const fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: elements have no padding.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// Elements as bytes, to be filled.
pub(super) const fn bytes_of_mut<T: Element>(elements: &mut [T]) -> &mut [u8] {
    // SAFETY: elements have no padding and no invalid bit patterns.
    unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), size_of_val(elements)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_taken_out_and_appended() {
        let mut tensor = Tensor::of(&[1u8, 2, 3, 4, 5, 6, 7, 8, 9], &[3, 3]);
        tensor.remove_rows(1, 2);
        assert_eq!(
            (tensor.as_slice::<u8>().unwrap(), tensor.shape()),
            (&[1, 2, 3, 7, 8, 9][..], &[2, 3][..])
        );
        tensor.extend_rows(4);
        assert_eq!(tensor.as_slice::<u8>().unwrap(), [1, 2, 3, 7, 8, 9, 0, 0, 0, 0, 0, 0]);
        tensor.as_mut_slice::<u8>().unwrap()[11] = 5;
        assert_eq!((tensor.bytes()[11], tensor.raw().count), (5, 12));
        let error = tensor.as_slice::<i8>().unwrap_err().to_string();
        assert_eq!(error, "malformed element type of a tensor: expected u8, got i8");
        assert!(Tensor::zeros(DType::F32, &[0, 8]).as_slice::<f32>().unwrap().is_empty());
    }
}
