//! A row of 32-bit slots that peers raise and their owner waits for: the control words in front of symmetric memory.
//! Each slot is a word of its own (narrower flags that share a word would race).

use crate::atomics::{Atomics, Native, Word};

/// Signal slots in shared memory. A slot has one writer at a time; values only grow (compared with wrap-around).
#[derive(Debug)]
pub struct SignalPad<'m, A: Atomics = Native> {
    slots: &'m [A::Word32],
}

impl<'m, A: Atomics> SignalPad<'m, A> {
    /// The pad that lies in `slots`.
    pub const fn new(slots: &'m [A::Word32]) -> Self {
        Self { slots }
    }

    /// Number of slots.
    pub const fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if there is no slot.
    pub const fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Sets `slot` to `value`; what the caller wrote before is visible to who sees it. False if there is no such slot.
    pub fn signal(&self, slot: usize, value: u32) -> bool {
        // SYNC: signalled memory (release) — everything written before the signal.
        self.slots.get(slot).map(|word| word.store_release(value)).is_some()
    }

    /// Whether `slot` holds at least `value`, half the number circle ahead counting as more. False if there is no
    /// such slot.
    pub fn has_reached(&self, slot: usize, value: u32) -> bool {
        // SYNC: signalled memory (acquire) — everything written before the signal.
        self.slots.get(slot).is_some_and(|word| word.load_acquire().wrapping_sub(value) < 1 << 31)
    }

    /// The word of `slot`, to sleep on.
    pub fn word(&self, slot: usize) -> Option<&'m A::Word32> {
        self.slots.get(slot)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use core::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn a_signal_reaches_its_slot_only_and_wraps() {
        let words = [AtomicU32::new(u32::MAX - 1), AtomicU32::new(0)];
        let pad = SignalPad::<Native>::new(&words);
        assert!(pad.has_reached(0, u32::MAX - 1) && !pad.has_reached(0, 3));
        assert!(pad.signal(0, 3));
        assert!(pad.has_reached(0, u32::MAX) && pad.has_reached(0, 3) && !pad.has_reached(0, 4));
        assert!(!pad.has_reached(1, 1));
        assert!(!pad.signal(2, 1) && !pad.has_reached(2, 0) && pad.word(2).is_none());
    }
}
