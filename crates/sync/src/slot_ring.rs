//! A ring of small records that one producer publishes and several consumers read in place, by epoch.
//!
//! Slot `epoch % depth` holds `[epoch, words…]`. The producer writes the words, then the epoch (release); a consumer
//! that sees the epoch it waits for (acquire) reads the words. A slot may be written again only when every consumer
//! has moved on: the producer must know that by other means (credits, or having heard of a later epoch from everyone).

use crate::atomics::{Atomics, Native, Word};

/// A ring of `depth` slots of `stride` 64-bit words, the first of which is the epoch.
#[derive(Debug)]
pub struct SlotRing<'m, A: Atomics = Native> {
    words: &'m [A::Word64],
    stride: usize,
    mask: u64,
}

impl<A: Atomics> Clone for SlotRing<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: Atomics> Copy for SlotRing<'_, A> {}

impl<'m, A: Atomics> SlotRing<'m, A> {
    /// The ring that lies in `words`: `words.len() / stride` slots, a power of two of them.
    ///
    /// # Panics
    /// If the number of slots is no power of two or `stride` is zero: the layout is ours, not a peer's.
    pub fn new(words: &'m [A::Word64], stride: usize) -> Self {
        assert!(
            stride > 0 && words.len().is_multiple_of(stride),
            "{} words in slots of {stride}",
            words.len()
        );
        let depth = words.len() / stride;
        assert!(depth.is_power_of_two(), "{depth} slots");
        Self { words, stride, mask: depth as u64 - 1 }
    }

    /// Number of slots.
    pub const fn depth(&self) -> u64 {
        self.mask + 1
    }

    /// The slot of `epoch`: its epoch word and its payload words.
    #[inline(always)]
    fn slot(self, epoch: u64) -> (&'m A::Word64, &'m [A::Word64]) {
        let start = (epoch & self.mask) as usize * self.stride;
        let slot = &self.words[start..start + self.stride];
        (&slot[0], &slot[1..])
    }

    /// Writes payload word `at` of the slot of `epoch`, before [`SlotRing::publish`].
    #[inline(always)]
    pub fn write(self, epoch: u64, at: usize, value: u64) {
        self.slot(epoch).1[at].store_relaxed(value);
    }

    /// Announces `epoch`: the words written to its slot, and everything else written before, become visible.
    #[inline(always)]
    pub fn publish(self, epoch: u64) {
        // SYNC: slot content (release) — payload words, and chunks copied before.
        self.slot(epoch).0.store_release(epoch);
    }

    /// True once `epoch` was announced; its words can be read until the producer is told to go on.
    #[inline(always)]
    pub fn is_published(self, epoch: u64) -> bool {
        // SYNC: slot content (acquire) — payload words, and chunks copied before.
        self.slot(epoch).0.load_acquire() == epoch
    }

    /// Payload word `at` of the slot of `epoch`, after [`SlotRing::is_published`].
    #[inline(always)]
    pub fn read(self, epoch: u64, at: usize) -> u64 {
        self.slot(epoch).1[at].load_relaxed()
    }

    /// The epoch that stands in the slot of `epoch` now.
    pub fn standing(self, epoch: u64) -> u64 {
        self.slot(epoch).0.load_acquire()
    }

    /// The epoch word of the slot of `epoch`, to sleep on.
    pub fn word(self, epoch: u64) -> &'m A::Word64 {
        self.slot(epoch).0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use core::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_slot_holds_the_words_of_its_epoch_only() {
        let words: Vec<AtomicU64> = (0..12).map(|_| AtomicU64::new(0)).collect();
        let ring = SlotRing::<Native>::new(&words, 3);
        assert_eq!(ring.depth(), 4);
        ring.write(6, 1, 99);
        assert!(!ring.is_published(6));
        ring.publish(6);
        assert!(ring.is_published(6) && !ring.is_published(2) && !ring.is_published(5));
        assert_eq!((ring.read(6, 1), ring.standing(2)), (99, 6));
    }
}
