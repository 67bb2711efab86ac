//! A barrier of n ranks: each raises its own flag to the round's epoch, then sees that every other flag got there.
//! n − 1 lines read per rank and round, no word written by two ranks, nothing cleared.

use crate::atomics::{Atomics, Native};
use crate::epoch_flag::EpochFlag;

/// One rank's view of a barrier.
#[derive(Debug)]
pub struct Barrier<'m, A: Atomics = Native> {
    flags: Vec<EpochFlag<'m, A>>,
    rank: usize,
    round: u64,
}

impl<'m, A: Atomics> Barrier<'m, A> {
    /// `flags[r]` is written by rank r; `rank` is the caller. All flags start below 1.
    pub fn new(flags: Vec<EpochFlag<'m, A>>, rank: usize) -> Self {
        Self { flags, rank, round: 0 }
    }

    /// Enters the next round and returns its number.
    pub fn arrive(&mut self) -> u64 {
        self.round += 1;
        self.flags[self.rank].publish(self.round);
        self.round
    }

    /// The lowest rank that has not entered `round` yet; `None` when all have, and then what each wrote before is visible.
    pub fn missing(&self, round: u64) -> Option<usize> {
        self.flags.iter().position(|flag| !flag.has_reached(round))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use core::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn the_missing_rank_is_named_until_it_arrives() {
        let words = [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)];
        let flags = || words.iter().map(EpochFlag::<Native>::new).collect::<Vec<_>>();
        let mut ranks: Vec<_> = (0..3).map(|rank| Barrier::new(flags(), rank)).collect();
        let round = ranks[2].arrive();
        assert_eq!(ranks[2].missing(round), Some(0));
        assert_eq!(ranks[0].arrive(), round);
        assert_eq!(ranks[2].missing(round), Some(1));
        ranks[1].arrive();
        assert_eq!(ranks[2].missing(round), None);
    }
}
