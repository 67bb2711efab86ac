//! The reductions of the host: bit for bit what `unisono_core::reduce_op::reference` answers, at the speed of memory.
//!
//! A (dtype, op) pair is one kernel, compiled for three levels of the instruction set; [`Reduction::new`] finds it in a
//! table, and a call costs one indirect jump. A kernel walks in blocks of some tens of elements that stay in registers:
//! load the block of every source in rank order, fold, finish, store once. So each byte is read once and written once
//! whatever the number of sources, nothing is allocated, and `dst` may be one of the sources.
//!
//! [`storage`] says how elements lie in memory, [`number`] how they are computed with, [`kernel`] walks, [`table`] lists.

mod kernel;
mod level;
mod number;
mod storage;
mod table;
#[cfg(test)]
mod tests;

use unisono_core::{DType, ReduceOp};

use self::kernel::Kernel;
use self::level::Level;

/// A reduction made ready for one call: dtype and op resolved to one kernel.
#[derive(Clone, Copy)]
pub(crate) struct Reduction {
    kernel: Kernel,
    /// Kernel elements per element: 2 where complex numbers are reduced as pairs of floats.
    parts: usize,
    /// Whether the kernel reads a scalar per source.
    scaled: bool,
}

impl Reduction {
    /// The kernel for this pair, which exists (plans are checked), on this machine: a look-up of a few nanoseconds.
    #[inline]
    pub(crate) fn new(dtype: DType, op: &ReduceOp) -> Self {
        let Some(reduction) = Self::at_level(dtype, op, Level::detected()) else {
            unreachable!("{op} of {dtype} was checked before");
        };
        reduction
    }

    #[inline]
    fn at_level(dtype: DType, op: &ReduceOp, level: Level) -> Option<Self> {
        let (kernel, parts) = table::find(dtype, *op, level)?;
        Some(Self { kernel, parts, scaled: matches!(op, ReduceOp::PreMulSum(_)) })
    }

    /// Whether each source has a scalar of its own.
    #[inline]
    pub(crate) const fn is_scaled(&self) -> bool {
        self.scaled
    }

    /// Reduces `count` elements of every source, in rank order, into `dst`.
    ///
    /// `scalars` has one entry per source for a pre-multiplied sum, else it is not read. An average divides by the
    /// number of sources. No source at all leaves `dst` as it is.
    ///
    /// # Safety
    ///
    /// Every source is valid for reads, and `dst` for writes, of `count` elements; `dst` may be exactly equal to one or
    /// more of the sources, and overlaps none in another way. No alignment is assumed. The sources may lie in memory
    /// that another process writes to: no reference to it is made, and whatever is read is a valid element.
    #[inline]
    pub(crate) unsafe fn run(&self, sources: &[*const u8], scalars: &[f64], dst: *mut u8, count: usize) {
        assert!(
            !self.scaled || scalars.len() == sources.len(),
            "{} scalars for {} sources",
            scalars.len(),
            sources.len()
        );
        // SAFETY: the caller vouches for the buffers; `at_level` was given a level that this machine has; the scalars
        // were counted.
        unsafe { (self.kernel)(sources, scalars, dst, count * self.parts) }
    }
}
