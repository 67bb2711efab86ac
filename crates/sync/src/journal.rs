//! A ring of small records that one writer overwrites for ever, and that anybody may look at, at any time.
//!
//! Record n lies in place `n mod depth`; its first word is n. The writer clears that word, writes the rest, then writes
//! it again. A reader takes the number before and after: if both are n, what it read between them is of record n. Nobody
//! waits for anybody. Some words of a record may change while it stands (what became of the call): each of them is right
//! by itself.

use crate::atomics::{Atomics, Native, Word};

/// A ring of `depth` records of `WORDS` 64-bit words, the first of which is the record's number, counted from 1.
#[derive(Debug)]
pub struct Journal<'m, const WORDS: usize, A: Atomics = Native> {
    words: &'m [A::Word64],
    mask: u64,
}

impl<const WORDS: usize, A: Atomics> Clone for Journal<'_, WORDS, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<const WORDS: usize, A: Atomics> Copy for Journal<'_, WORDS, A> {}

impl<'m, const WORDS: usize, A: Atomics> Journal<'m, WORDS, A> {
    /// The journal that lies in `words`.
    ///
    /// # Panics
    /// If that is no power of two of whole records: the layout is ours, not a peer's.
    pub fn new(words: &'m [A::Word64]) -> Self {
        assert!(words.len().is_multiple_of(WORDS), "{} words in records of {WORDS}", words.len());
        let depth = words.len() / WORDS;
        assert!(depth.is_power_of_two(), "{depth} records");
        Self { words, mask: depth as u64 - 1 }
    }

    #[inline(always)]
    fn record(self, number: u64) -> &'m [A::Word64] {
        let start = (number & self.mask) as usize * WORDS;
        &self.words[start..start + WORDS]
    }

    /// Writes record `number` over the one that stands in its place. `words[0]` is ignored.
    #[inline(always)]
    pub fn write(self, number: u64, words: &[u64; WORDS]) {
        let record = self.record(number);
        record[0].store_relaxed(0);
        for (word, value) in record[1..].iter().zip(&words[1..]) {
            // SYNC: record replaced (release) — whoever sees a new word sees that the old number is gone.
            word.store_release(*value);
        }
        // SYNC: record complete (release) — all words of the record.
        record[0].store_release(number);
    }

    /// Changes word `at` of record `number`, which stands.
    #[inline(always)]
    pub fn set(self, number: u64, at: usize, value: u64) {
        self.record(number)[at].store_relaxed(value);
    }

    /// Word `at` of record `number`, for its writer.
    #[inline(always)]
    pub fn word(self, number: u64, at: usize) -> u64 {
        self.record(number)[at].load_relaxed()
    }

    /// Record `number`, unless another one stands in its place.
    pub fn read(self, number: u64) -> Option<[u64; WORDS]> {
        let record = self.record(number);
        // SYNC: record complete (acquire) — all words of the record.
        if number == 0 || record[0].load_acquire() != number {
            return None;
        }
        // SYNC: record replaced (acquire) — if any of these words is a newer one, the number below is another.
        let mut words: [u64; WORDS] = std::array::from_fn(|at| record[at].load_acquire());
        words[0] = number;
        (record[0].load_relaxed() == number).then_some(words)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use core::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn the_latest_records_stand_and_older_ones_are_gone() {
        let words: Vec<AtomicU64> = (0..12).map(|_| AtomicU64::new(0)).collect();
        let journal = Journal::<3>::new(&words);
        assert_eq!((journal.read(0), journal.read(1)), (None, None));
        for number in 1..=6 {
            journal.write(number, &[0, number * 10, 7]);
        }
        journal.set(5, 2, 8);
        let standing: Vec<_> = (1..=7).map(|number| journal.read(number)).collect();
        let expected =
            [None, None, Some([3, 30, 7]), Some([4, 40, 7]), Some([5, 50, 8]), Some([6, 60, 7]), None];
        assert_eq!(standing, expected);
        assert_eq!(journal.word(5, 2), 8);
    }
}
