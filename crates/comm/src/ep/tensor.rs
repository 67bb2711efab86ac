//! What expert-parallel operations take and give: borrowed memory with its type, and tensors of their own.

use std::marker::PhantomData;

use unisono_core::{DType, Element};

use crate::buffer::{Buf, Place, RawBuffer};
use crate::error::{Error, Result};

/// A borrowed input of any element type: made from slices, vectors, arrays, [`Buf`]s and [`Tensor`]s.
#[derive(Clone, Copy, Debug)]
pub struct Input<'b> {
    raw: RawBuffer,
    life: PhantomData<&'b ()>,
}

impl<'b> Input<'b> {
    /// The description.
    pub const fn raw(&self) -> RawBuffer {
        self.raw
    }

    /// Its bytes, if they lie in ordinary memory of the host.
    pub(super) fn bytes(&self, call: &'static str, rank: usize) -> Result<&'b [u8]> {
        if self.raw.place != Place::Host {
            let (expected, got) = ("host memory".to_owned(), self.raw.place.to_string());
            return Err(Error::Place { call, rank, expected, got });
        }
        let start = std::ptr::with_exposed_provenance(self.raw.ptr as usize);
        // SAFETY: it was made from a borrow of `'b` of so many elements, which have no padding.
        Ok(unsafe { std::slice::from_raw_parts(start, self.raw.bytes()) })
    }
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

/// An output: elements of one type, row-major, in the memory that its buffer works on (the host's). Outputs never alias.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor {
    /// Words, so that every element is aligned.
    words: Vec<u64>,
    dtype: DType,
    shape: Vec<usize>,
}

impl Tensor {
    /// Zeros.
    pub(super) fn zeros(dtype: DType, shape: &[usize]) -> Self {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Self { words: vec![0; bytes.div_ceil(8)], dtype, shape: shape.to_vec() }
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
    /// [`Error::Core`] if they are of another type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.check_type(T::DTYPE)?;
        // SAFETY: the words hold so many elements, are aligned for all of them, and every bit pattern is a `T`.
        Ok(unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len()) })
    }

    /// Its elements, to be changed.
    ///
    /// # Errors
    /// As [`Tensor::as_slice`].
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.check_type(T::DTYPE)?;
        // SAFETY: as above; a `T` has no padding, so the words stay initialised.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.len()) })
    }

    /// The description, for bindings to other languages.
    pub fn raw(&self) -> RawBuffer {
        let ptr = self.words.as_ptr().expose_provenance() as u64;
        RawBuffer { ptr, count: self.len(), dtype: self.dtype, place: Place::Host }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the words hold so many bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len() * self.dtype.size()) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.len() * self.dtype.size();
        // SAFETY: as above; any byte may be written.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), bytes) }
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
        self.words.resize((self.len() * self.dtype.size()).div_ceil(8), 0);
        self.bytes_mut()[before..].fill(0);
    }

    fn check_type(&self, asked: DType) -> Result<()> {
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
