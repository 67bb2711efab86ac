//! An operation as data: what it does and on which buffers. Everything behind [`crate::Operations::submit`] works on
//! this, and nothing there is generic.

use std::marker::PhantomData;

use smallvec::SmallVec;
pub use unisono_core::call::Kind;

use crate::buffer::RawBuffer;

/// The sizes of a buffer's parts, one for every rank, in elements.
#[derive(Clone, Copy, Debug)]
pub struct Counts<'b> {
    /// Elements of each part, by rank.
    pub counts: &'b [usize],
    /// Where each part starts, by rank; `None` if they follow each other. Parts do not overlap.
    pub offsets: Option<&'b [usize]>,
}

impl<'b> From<&'b [usize]> for Counts<'b> {
    fn from(counts: &'b [usize]) -> Self {
        Self { counts, offsets: None }
    }
}

impl<'b> From<&'b Vec<usize>> for Counts<'b> {
    fn from(counts: &'b Vec<usize>) -> Self {
        counts.as_slice().into()
    }
}

impl<'b, const N: usize> From<&'b [usize; N]> for Counts<'b> {
    fn from(counts: &'b [usize; N]) -> Self {
        counts.as_slice().into()
    }
}

/// One operation, ready to be submitted. `'b` is the life of its buffers.
#[derive(Debug)]
pub struct Call<'b> {
    pub(crate) kind: Kind,
    pub(crate) buffers: SmallVec<[RawBuffer; 2]>,
    counts: Vec<Counts<'b>>,
    life: PhantomData<&'b mut ()>,
}

impl<'b> Call<'b> {
    /// Inline, so that the buffers are written where they stay.
    #[inline]
    pub(crate) fn new(kind: Kind, buffers: impl IntoIterator<Item = RawBuffer>) -> Self {
        let mut call = Self { kind, buffers: SmallVec::new(), counts: Vec::new(), life: PhantomData };
        for buffer in buffers {
            call.buffers.push(buffer);
        }
        call
    }

    #[inline]
    pub(crate) fn with_counts(mut self, counts: &[Counts<'b>]) -> Self {
        self.counts.extend_from_slice(counts);
        self
    }

    /// A call from raw descriptions: the door for bindings to other languages.
    ///
    /// The buffers are, in order: the input and the output, or one that is both; of messages the input, the output, or both; of
    /// the operations on several buffers all of them; of an all-to-all with counts in memory input, output, send counts, receive counts
    /// and, if there are any, send offsets; of one on rows input, residual, new residual, weight, output and, if there is one, scale;
    /// `barrier` has none. Where parts have sizes of their own, `counts` holds
    /// those of the side that has a part for every rank; of both, the input's first.
    ///
    /// # Safety
    /// Every buffer is valid for `count` elements of its dtype, aligned or not; targets are written, sources read; and
    /// nobody else touches them until the submitted operation is complete.
    #[inline]
    pub unsafe fn from_raw(kind: Kind, buffers: &[RawBuffer], counts: &[Counts<'b>]) -> Self {
        let mut call = Self::new(kind, buffers.iter().copied());
        call.counts.extend_from_slice(counts);
        call
    }

    /// What it does.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The sizes of its parts, where they are not all alike.
    pub fn counts(&self) -> &[Counts<'b>] {
        &self.counts
    }

    /// Its buffers.
    #[inline]
    pub fn buffers(&self) -> &[RawBuffer] {
        &self.buffers
    }
}
