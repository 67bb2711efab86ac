//! A rank that was left out is taken in again: a buffer is followed by one of the same settings that has all ranks.
//!
//! Masks are final, so the second buffer is made while the first still stands, over the same communicator. Whether it counts is settled by
//! whoever comes first, in a word that all ranks share: who has met all others settles that it does, who fails on the way there that it does
//! not. So a rank that dies meanwhile cannot have some go on with the new buffer and others with the old one. It costs the memory of both
//! buffers, and some meetings of all ranks.

use unisono_sync::Fate;
use unisono_sync::memory::words32;

use super::Buffer;
use crate::cause::Cause;
use crate::communicator::Communicator;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::operations::Operations;
use crate::symmetric::Symmetric;

/// How a renewal ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    /// The new buffer counts.
    Taken,
    /// The old one does.
    Abandoned,
}

/// The word in which it is settled.
#[derive(Debug)]
struct Settlement(Symmetric<u64>);

impl Settlement {
    /// Makes it on all ranks. Collective.
    fn make(communicator: &Communicator) -> Result<Self> {
        communicator.window::<u64>(1, crate::Memory::Host)?.into_symmetric(communicator).map(Self)
    }

    /// Settles it so, unless it is settled; how it is. Waits for nobody, also if the communicator has failed.
    fn settle(&self, outcome: Outcome) -> Result<Outcome> {
        let word = std::ptr::with_exposed_provenance_mut(self.0.address(0)? as usize);
        // SAFETY: rank 0's copy is eight bytes on a page of their own, which `self` keeps mapped; all ranks access it as 32-bit atomics only.
        let fate = Fate::new(unsafe { &words32(word, 1)[0] });
        let is_taken = fate.settle(u32::from(outcome == Outcome::Taken)) == 1;
        Ok(if is_taken { Outcome::Taken } else { Outcome::Abandoned })
    }
}

impl Buffer {
    /// A buffer of the same settings, exchanged, in which nobody is left out: for ranks that live, but were silent for too long, or were left out by
    /// [`Buffer::mask_rank`]. Collective over all ranks of the communicator, those included that are left out, whose calls fail with
    /// [`Error::GivenUp`]. This buffer stays as it is; [`Buffer::close`] it then, which works on all ranks too. Handles belong to the buffer that
    /// made them. Memory for both is needed meanwhile.
    ///
    /// It succeeds on all ranks that live, or fails on all; and then those that were not left out can go on with this buffer. If a rank dies just
    /// when all have met, it succeeds, and the new buffer leaves out the dead.
    ///
    /// # Errors
    /// [`Error::Argument`] without masking, or if `communicator` is not its own; [`Error::BufferState`] before the exchange; those of a failed
    /// communicator: a rank that died is named at once, one that does not call when the communicator's timeout is over, which fails this
    /// buffer too.
    pub fn renew(&self, communicator: &Communicator) -> Result<Self> {
        let call = "renew";
        self.check_owner(call, communicator)?;
        if !self.settings.masking {
            return Err(self.refuse(call, "settings", "masking".to_owned(), "none"));
        }
        if !self.is_exchanged() {
            let state = || self.wrong_state(call, "all ranks have exchanged", "is only constructed");
            return Err(self.failed.clone().unwrap_or_else(state));
        }
        let settlement = Settlement::make(communicator)?;
        let mut renewed = Self::new(communicator, self.settings.clone())?;
        let made = renewed.exchange(communicator).and_then(|()| communicator.barrier());
        let ours = if made.is_ok() { Outcome::Taken } else { Outcome::Abandoned };
        if settlement.settle(ours)? == Outcome::Abandoned {
            // Who met all others, and hears that somebody did not: the communicator had failed before that was settled.
            made?;
            let unknown = || Cause::Aborted { rank: self.rank as u32, reason: "unknown".to_owned() };
            let cause = self.control.cause().unwrap_or_else(unknown);
            return Err(cause.into_error(call, self.control.member()));
        }
        renewed.expect_all_at_once(self);
        // If the communicator has failed meanwhile, this hold on the word has ended all the same.
        let _ = settlement.0.close(communicator);
        Ok(renewed)
    }

    /// Ranks that have met in `before` need no longer time for their first call.
    fn expect_all_at_once(&mut self, before: &Self) {
        if let (Some(arena), Some(before)) = (&mut self.arena, &before.arena) {
            arena.has_met = before.has_met;
        }
        #[cfg(feature = "cuda")]
        if let (Some(gpu), Some(before)) = (&mut self.gpu, &before.gpu) {
            gpu.has_met = before.has_met;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ep::Settings;
    use crate::error::Error;

    fn on_threads<T: Send + 'static>(count: usize, main: fn(Communicator) -> T) -> Vec<T> {
        let ranks = Communicator::threads(count).unwrap();
        let all: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || main(rank))).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    }

    #[test]
    fn all_ranks_are_told_what_the_first_one_settled() {
        for first in [Outcome::Taken, Outcome::Abandoned] {
            let main = if first == Outcome::Taken { settle::<true> } else { settle::<false> };
            assert_eq!(on_threads(3, main), [[first; 2]; 3]);
        }
    }

    /// What a rank is told twice, once rank 1 has settled it and the communicator has failed.
    fn settle<const IS_TAKEN: bool>(rank: Communicator) -> [Outcome; 2] {
        let settlement = Settlement::make(&rank).unwrap();
        if rank.rank() == 1 {
            let first = if IS_TAKEN { Outcome::Taken } else { Outcome::Abandoned };
            settlement.settle(first).unwrap();
        }
        // Rank 2 may abort before others have left it; but then all have come.
        let _ = rank.barrier();
        if rank.rank() == 2 {
            rank.observer().abort("enough");
        }
        [Outcome::Taken, Outcome::Abandoned].map(|ours| settlement.settle(ours).unwrap())
    }

    /// Whether `rank` goes on with the new buffer, where rank 2 dies behind this many steps of a renewal.
    fn renew<const STEPS: u32>(rank: Communicator) -> Option<bool> {
        let settings = Settings { capacity: 1, masking: true, ..Settings::new(8, 4) };
        let mut buffer = Buffer::new(&rank, settings.clone()).unwrap();
        buffer.exchange(&rank).unwrap();
        if rank.rank() != 2 {
            let renewed = buffer.renew(&rank);
            if let Err(error) = &renewed {
                assert!(matches!(error, Error::PeerDied { rank: 2, .. }), "{error}");
                assert!(buffer.check().is_ok(), "a masked death is no failure of the old one");
            }
            return Some(renewed.is_ok());
        }
        let _settlement = (STEPS > 0).then(|| Settlement::make(&rank).unwrap());
        let mut renewed = Buffer::new(&rank, settings).unwrap();
        if STEPS > 1 {
            renewed.exchange(&rank).unwrap();
        }
        if STEPS > 2 {
            rank.barrier().unwrap();
        }
        let who = rank.control.name(2).to_owned();
        rank.control.fail(&Cause::Died { rank: 2, who, how: "it was said so".to_owned() });
        None
    }

    #[test]
    fn a_death_meanwhile_has_all_others_go_on_with_the_same_buffer() {
        for main in [renew::<0>, renew::<1>, renew::<2>] {
            assert_eq!(on_threads(4, main), [Some(false), Some(false), None, Some(false)]);
        }
        // All have met: whoever hears of it first, and when, they go on alike.
        for _ in 0..50 {
            let outcomes = on_threads(4, renew::<3>);
            assert!([0, 1, 3].iter().all(|rank| outcomes[*rank] == outcomes[0]), "{outcomes:?}");
        }
    }
}
