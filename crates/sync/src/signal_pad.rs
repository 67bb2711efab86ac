//! A row of slots that peers raise and their owner waits for: the control words of symmetric memory. A slot holds 32 bits;
//! it is a word of its own, on a line of its own (narrower flags that share a word would race).

use crate::atomics::{Atomics, Native, Word};

/// Signal slots in shared memory. A slot has one writer at a time; values only grow (compared with wrap-around).
#[derive(Debug)]
pub struct SignalPad<'m, A: Atomics = Native> {
    words: &'m [A::Word64],
    stride: usize,
}

impl<'m, A: Atomics> SignalPad<'m, A> {
    /// The pad that lies in `words`: a slot every `stride` words.
    ///
    /// # Panics
    /// If `stride` is 0: the layout is ours, not a peer's.
    pub fn new(words: &'m [A::Word64], stride: usize) -> Self {
        assert!(stride > 0, "slots of no words");
        Self { words, stride }
    }

    /// Number of slots.
    pub const fn len(&self) -> usize {
        self.words.len() / self.stride
    }

    /// True if there is no slot.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets `slot` to `value`; what the caller wrote before is visible to who sees it. False if there is no such slot.
    pub fn signal(&self, slot: usize, value: u32) -> bool {
        // SYNC: signalled memory (release) — everything written before the signal.
        self.word(slot).map(|word| word.store_release(u64::from(value))).is_some()
    }

    /// What `slot` holds. `None` if there is no such slot.
    pub fn value(&self, slot: usize) -> Option<u32> {
        // SYNC: signalled memory (acquire) — everything written before the signal.
        self.word(slot).map(|word| word.load_acquire() as u32)
    }

    /// Whether `slot` holds at least `value`, half the number circle ahead counting as more. False if there is no
    /// such slot.
    pub fn has_reached(&self, slot: usize, value: u32) -> bool {
        self.value(slot).is_some_and(|holds| holds.wrapping_sub(value) < 1 << 31)
    }

    /// The word of `slot`, to sleep on.
    pub fn word(&self, slot: usize) -> Option<&'m A::Word64> {
        if slot < self.len() { self.words.get(slot * self.stride) } else { None }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use core::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_signal_reaches_its_slot_only_and_wraps() {
        let words = [const { AtomicU64::new(0) }; 6];
        let pad = SignalPad::<Native>::new(&words, 3);
        assert!(pad.signal(0, u32::MAX - 1));
        assert!(pad.has_reached(0, u32::MAX - 1) && !pad.has_reached(0, 3));
        assert!(pad.signal(0, 3));
        assert!(pad.has_reached(0, u32::MAX) && pad.has_reached(0, 3) && !pad.has_reached(0, 4));
        assert_eq!((pad.len(), pad.value(0), pad.value(1)), (2, Some(3), Some(0)));
        assert!(!pad.has_reached(1, 1));
        assert!(!pad.signal(2, 1) && !pad.has_reached(2, 0) && pad.word(2).is_none());
    }
}
