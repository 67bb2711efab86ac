//! A count that one side moves forward and others wait for. It never goes back, so no clearing and no wrap: 64 bits
//! count calls and steps for ever.

use crate::atomics::{Atomics, Native, Word};

/// A monotonic 64-bit count in shared memory. One writer, any number of readers.
#[derive(Debug)]
pub struct EpochFlag<'m, A: Atomics = Native> {
    word: &'m A::Word64,
}

impl<A: Atomics> Clone for EpochFlag<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: Atomics> Copy for EpochFlag<'_, A> {}

impl<'m, A: Atomics> EpochFlag<'m, A> {
    /// The flag that lies in `word`.
    pub const fn new(word: &'m A::Word64) -> Self {
        Self { word }
    }

    /// Announces `epoch`: whatever the caller wrote before is visible to who sees it.
    #[inline(always)]
    pub fn publish(self, epoch: u64) {
        // SYNC: epoch content (release) — everything written before this epoch.
        self.word.store_release(epoch);
    }

    /// True once `epoch` was announced; then what its announcer wrote before is visible.
    #[inline(always)]
    pub fn has_reached(self, epoch: u64) -> bool {
        // SYNC: epoch content (acquire) — everything written before this epoch.
        self.word.load_acquire() >= epoch
    }

    /// [`EpochFlag::has_reached`], but false if the word says more than `ahead` beyond it: then it cannot be the announcer
    /// who wrote it.
    #[inline(always)]
    pub fn is_within(self, epoch: u64, ahead: u64) -> bool {
        // SYNC: epoch content (acquire) — everything written before this epoch.
        self.word.load_acquire().wrapping_sub(epoch) <= ahead
    }

    /// The epoch announced last, with what was written before it.
    #[inline(always)]
    pub fn current(self) -> u64 {
        self.word.load_acquire()
    }

    /// The word itself, to sleep on.
    pub const fn word(self) -> &'m A::Word64 {
        self.word
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use core::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_word_too_far_ahead_is_not_within() {
        let word = AtomicU64::new(0);
        let flag = EpochFlag::<Native>::new(&word);
        for (at, is_within) in [(6, false), (7, true), (15, true), (16, false), (u64::MAX, false), (0, false)]
        {
            flag.publish(at);
            assert_eq!(flag.is_within(7, 8), is_within, "{at}");
        }
        assert!(flag.has_reached(0) && !flag.has_reached(1));
    }
}
