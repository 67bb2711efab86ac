//! A member's attendance: a count of rounds that its owner moves on, and that any other may close for good. Both go by
//! compare-and-swap on one word, so all see alike how many rounds the member took part in, and a member that was given up learns so
//! when it tries to go on.

#[cfg(not(loom))]
use core::sync::atomic::{Ordering, fence};
#[cfg(loom)]
use loom::sync::atomic::{Ordering, fence};

use crate::atomics::{Atomics, Native, Word};

/// Set once the member takes part no more.
const CLOSED: u64 = 1 << 63;

/// An attendance in shared memory: the rounds in the low 63 bits. One owner, any number of others.
#[derive(Debug)]
pub struct Attendance<'m, A: Atomics = Native> {
    word: &'m A::Word64,
}

/// What an attendance says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Rounds that the member took part in.
    pub rounds: u64,
    /// Whether it takes part in no other.
    pub is_closed: bool,
}

impl<A: Atomics> Clone for Attendance<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: Atomics> Copy for Attendance<'_, A> {}

impl<'m, A: Atomics> Attendance<'m, A> {
    /// The attendance that lies in `word`; 0 has attended nothing.
    pub const fn new(word: &'m A::Word64) -> Self {
        Self { word }
    }

    /// Announces `round`, the next one, by its owner: whatever the caller wrote before is visible to who sees it. False if the member was
    /// given up.
    pub fn attend(self, round: u64) -> bool {
        // SYNC: content of a round (release) — everything written before.
        self.word.compare_exchange(round.wrapping_sub(1), round).is_ok()
    }

    /// Closes it, unless it is closed; in which rounds the member took part.
    pub fn close(self) -> Standing {
        let mut word = self.word.load_acquire();
        while word & CLOSED == 0 {
            match self.word.compare_exchange(word, word | CLOSED) {
                Ok(_) => word |= CLOSED,
                Err(now) => word = now,
            }
        }
        self.standing()
    }

    /// What it says now. What the member wrote before the last of its rounds is visible.
    pub fn standing(self) -> Standing {
        // SYNC: content of a round (acquire) — everything that the member wrote before.
        let word = self.word.load_acquire();
        Standing { rounds: word & !CLOSED, is_closed: word & CLOSED != 0 }
    }

    /// By its owner, behind reads of what others may have overwritten since they gave it up: whether they had not.
    pub fn was_open(self) -> bool {
        // SYNC: overwritten rounds (acquire) — whoever's writes we read, its closing is visible.
        fence(Ordering::Acquire);
        self.word.load_relaxed() & CLOSED == 0
    }

    /// The word itself, to sleep on.
    pub const fn word(self) -> &'m A::Word64 {
        self.word
    }
}

/// Before what closed members may still read is overwritten.
pub fn before_overwriting() {
    // SYNC: overwritten rounds (release) — that the members were closed.
    fence(Ordering::Release);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use core::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_member_that_was_given_up_attends_no_other_round() {
        let word = AtomicU64::new(0);
        let attendance = Attendance::<Native>::new(&word);
        assert!(attendance.attend(1) && attendance.attend(2) && attendance.was_open());
        assert_eq!(attendance.standing(), Standing { rounds: 2, is_closed: false });
        assert!(!attendance.attend(2), "a round is attended once");
        let closed = Standing { rounds: 2, is_closed: true };
        assert_eq!((attendance.close(), attendance.close()), (closed, closed));
        assert!(!attendance.attend(3) && !attendance.was_open());
        assert_eq!(attendance.standing(), closed);
    }
}
