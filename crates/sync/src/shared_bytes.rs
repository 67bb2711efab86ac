//! Bytes that others read and write at any time: copied in and out word by word, so that a copy may see old and new words
//! side by side, but no access is a data race.
//!
//! All accesses are 64 bits wide: mixed sizes would be undefined where they race. So a write that begins or ends inside a
//! word replaces its part of it and leaves the rest as whoever else writes it.

use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes in a word.
const WORD: usize = 8;

/// A run of shared bytes.
#[derive(Clone, Copy, Debug)]
pub struct SharedBytes<'m> {
    words: &'m [AtomicU64],
}

impl<'m> SharedBytes<'m> {
    /// The bytes of `words`.
    pub const fn new(words: &'m [AtomicU64]) -> Self {
        Self { words }
    }

    /// Number of bytes.
    pub const fn len(&self) -> usize {
        self.words.len() * WORD
    }

    /// True if there are none.
    pub const fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Copies the bytes from `at` on to `target`.
    ///
    /// # Panics
    /// If they do not lie inside: callers check what users give them.
    pub fn read(&self, at: usize, target: &mut [u8]) {
        let (head, body) = target.split_at_mut(target.len().min(at.next_multiple_of(WORD) - at));
        if !head.is_empty() {
            let start = at % WORD;
            head.copy_from_slice(&self.load(at / WORD)[start..start + head.len()]);
        }
        if body.is_empty() {
            return;
        }
        let first = at.div_ceil(WORD);
        let (whole, tail) = body.as_chunks_mut::<WORD>();
        let end = first + whole.len();
        for (bytes, word) in whole.iter_mut().zip(&self.words[first..end]) {
            *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        if !tail.is_empty() {
            tail.copy_from_slice(&self.load(end)[..tail.len()]);
        }
    }

    /// Copies `source` to the bytes from `at` on.
    ///
    /// # Panics
    /// As [`SharedBytes::read`].
    pub fn write(&self, at: usize, source: &[u8]) {
        let (head, body) = source.split_at(source.len().min(at.next_multiple_of(WORD) - at));
        if !head.is_empty() {
            self.replace(at / WORD, at % WORD, head);
        }
        if body.is_empty() {
            return;
        }
        let first = at.div_ceil(WORD);
        let (whole, tail) = body.as_chunks::<WORD>();
        for (bytes, word) in whole.iter().zip(&self.words[first..first + whole.len()]) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        if !tail.is_empty() {
            self.replace(first + whole.len(), 0, tail);
        }
    }

    fn load(&self, word: usize) -> [u8; WORD] {
        self.words[word].load(Ordering::Relaxed).to_ne_bytes()
    }

    /// Writes a part of one word.
    fn replace(&self, word: usize, at: usize, part: &[u8]) {
        let with_part = |old: u64| {
            let mut bytes = old.to_ne_bytes();
            bytes[at..at + part.len()].copy_from_slice(part);
            u64::from_ne_bytes(bytes)
        };
        self.words[word].update(Ordering::Relaxed, Ordering::Relaxed, with_part);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn words(count: usize) -> Vec<AtomicU64> {
        (0..count).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn every_range_is_written_and_read_and_nothing_beside_it() {
        for (at, length) in (0..24).flat_map(|at| (0..=32 - at).map(move |length| (at, length))) {
            let words = words(4);
            let shared = SharedBytes::new(&words);
            let mut expected: Vec<u8> = (0..32).map(|byte| byte ^ 0x5a).collect();
            shared.write(0, &expected);
            let part: Vec<u8> = (0..length as u8).map(|byte| byte + 100).collect();
            shared.write(at, &part);
            expected[at..at + length].copy_from_slice(&part);
            let (mut all, mut got) = ([0; 32], vec![0; length]);
            shared.read(0, &mut all);
            shared.read(at, &mut got);
            assert!(all[..] == expected && got == part, "{length} bytes at {at}");
        }
    }

    #[test]
    fn neighbours_inside_a_word_do_not_lose_each_others_bytes() {
        let words = words(2);
        std::thread::scope(|scope| {
            for (at, value) in [(3usize, 1u8), (6, 2), (9, 3)] {
                let shared = SharedBytes::new(&words);
                scope.spawn(move || (0..10_000).for_each(|_| shared.write(at, &[value; 3])));
            }
        });
        let mut got = [0; 16];
        SharedBytes::new(&words).read(0, &mut got);
        assert_eq!(got, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0, 0]);
    }
}
