//! An operation as data: what it does and on which buffers. Everything behind [`crate::Operations::submit`] works on
//! this, and nothing there is generic.

use std::marker::PhantomData;

use smallvec::SmallVec;
pub use unisono_core::call::Kind;

use crate::buffer::RawBuffer;

/// One operation, ready to be submitted. `'b` is the life of its buffers.
#[derive(Debug)]
pub struct Call<'b> {
    pub(crate) kind: Kind,
    pub(crate) buffers: SmallVec<[RawBuffer; 2]>,
    life: PhantomData<&'b mut ()>,
}

impl<'b> Call<'b> {
    pub(crate) fn new(kind: Kind, buffers: &[RawBuffer]) -> Self {
        Self { kind, buffers: SmallVec::from_slice(buffers), life: PhantomData }
    }

    /// A call from raw descriptions: the door for bindings to other languages.
    ///
    /// The buffers are, in order: `all_reduce` and `broadcast` the buffer itself, or source and target; `all_gather`
    /// the whole result (with the own part in its place), or source and whole result; `barrier` none.
    ///
    /// # Safety
    /// Every buffer is valid for `count` elements of its dtype, aligned or not; targets are written, sources read; and
    /// nobody else touches them until the submitted operation is complete.
    pub unsafe fn from_raw(kind: Kind, buffers: &[RawBuffer]) -> Self {
        Self::new(kind, buffers)
    }

    /// What it does.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Its buffers.
    pub fn buffers(&self) -> &[RawBuffer] {
        &self.buffers
    }
}
