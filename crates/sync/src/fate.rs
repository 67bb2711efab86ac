//! A member's fate: a word that is settled once, by whoever comes first. So a member that is about to decide and another
//! that gives it up cannot both succeed.

use core::sync::atomic::AtomicU32;

use crate::atomics::Word;

/// 0 while it is open; else 1 + the member that settled it.
#[derive(Clone, Copy, Debug)]
pub struct Fate<'m>(&'m AtomicU32);

impl<'m> Fate<'m> {
    /// The fate that lies in `word`.
    pub const fn new(word: &'m AtomicU32) -> Self {
        Self(word)
    }

    /// Settles it for `by`, unless it is settled already; who settled it.
    pub fn settle(self, by: u32) -> u32 {
        match Word::compare_exchange(self.0, 0, by.wrapping_add(1)) {
            Ok(_) => by,
            Err(settled) => settled.wrapping_sub(1),
        }
    }

    /// Who settled it, if anybody did.
    pub fn settled(self) -> Option<u32> {
        self.0.load_acquire().checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_settles_it_and_all_others_learn_who_that_was() {
        let word = AtomicU32::new(0);
        let fate = Fate::new(&word);
        assert_eq!(fate.settled(), None);
        let race = |by| std::thread::scope(|scope| scope.spawn(|| fate.settle(by)).join().unwrap());
        let first = race(7);
        assert_eq!((first, fate.settle(3), fate.settled()), (7, 7, Some(7)));
    }
}
