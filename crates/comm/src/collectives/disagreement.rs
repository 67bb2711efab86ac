//! How ranks that have made different calls find out, and what they say then.
//!
//! Whoever reads a peer's data compares chains before. That is not enough: a rank that only sends may wait for credit of
//! a peer that waits for another call of ours. So a wait that lasts looks whether all peers still do what we
//! do, and so does whoever takes credit for its slot. Ranks that differ see it at the latest when their credit ends, [`CALL_SLOTS`] calls later.
//!
//! Calls on GPUs have numbers of their own, which kernels compare. Where one rank gives memory of the host and another one that of its
//! GPU, neither meets the other. Each would wait for its deadline; so whoever waits on the host looks whether a peer that has not come
//! waits on its GPU, in a call that this rank has not made.

use unisono_core::call::{CallHeader, HEADER_WORDS};
use unisono_core::layout::{CALL_SLOTS, SLOT_CHAIN, SLOT_HEADER};
#[cfg(feature = "cuda")]
use unisono_core::recorder::has_made;

use super::engine::{Engine, HISTORY, slot_of};
#[cfg(feature = "cuda")]
use super::waiting::Blocked;
use crate::cause::Cause;
use crate::error::Error;
#[cfg(feature = "cuda")]
use crate::recorder::{ask, clock};

impl Engine {
    /// Calls that `peer` has completed, from its trail: the high half counts modulo 2³², and a peer only moves forward,
    /// never by that much unseen.
    pub(super) fn completed(&self, peer: usize, trail: u64) -> u64 {
        let known = self.known[peer].epoch;
        known + u64::from(((trail >> 32) as u32).wrapping_sub(known as u32))
    }

    /// The number of calls that `peer` has completed; or the latest call up to which it is known to have made others
    /// than we did.
    ///
    /// A peer that is in our call or ahead of it has a slot for it, which it keeps until we have completed the call; of
    /// one that is behind, the trail tells the chain at the last call that it completed.
    pub(super) fn compare(&self, peer: usize) -> Result<u64, u64> {
        let theirs = self.control.rank(peer);
        let trail = theirs.trail.current();
        let epoch = self.completed(peer, trail);
        if theirs.slots.is_published(self.epoch) {
            let is_equal = theirs.slots.read(self.epoch, SLOT_CHAIN) == self.chain;
            return if is_equal { Ok(epoch) } else { Err(self.epoch) };
        }
        let is_remembered = epoch < self.epoch && epoch + HISTORY > self.epoch && epoch > 0;
        if is_remembered && self.chains[(epoch % HISTORY) as usize] != trail as u32 {
            return Err(epoch);
        }
        Ok(epoch)
    }

    /// Fails everybody if a peer that has not begun our call waits on its GPU in one that we have not made: then its calls were in another
    /// order than ours, or in memory of its GPU where ours are not. Kernels tell a wait after half a second.
    #[cfg(feature = "cuda")]
    #[cold]
    pub(super) fn meets_on_gpu(&self, blocked: Blocked) -> Option<Error> {
        if blocked.on.is_of_messages() {
            return None;
        }
        let made = self.control.made_on_gpu();
        let awaited = |peer: usize| {
            let awaited = self.control.awaited_on_gpu(peer);
            let call = |world: usize| {
                awaited[world].filter(|call| made[world].is_some_and(|made| !has_made(made, *call)))
            };
            (0..made.len()).find_map(|world| Some((peer, world, call(world)?)))
        };
        let (peer, world, number) = self.peers().filter(|peer| self.is_late(*peer)).find_map(awaited)?;
        let left = match CallHeader::from_words(&self.current) {
            Some(header) => header.describe(self.epoch - 1, self.rank as u32),
            None => format!("{} on rank {}", self.call_name(), self.rank),
        };
        let right = match if world == 0 { self.header_on_gpu(peer, number) } else { None } {
            Some(header) => header.describe(u64::from(number), peer as u32) + " on its GPU",
            None if world == 0 => format!("call #{number} on the GPU of rank {peer}"),
            None => format!("call #{number} on all GPUs of rank {peer}"),
        };
        Some(self.abort_with(Cause::Mismatch { left: left + " in host memory", right }))
    }

    /// What call `number` on the GPU of `peer` is, if its flight recorder tells.
    #[cfg(feature = "cuda")]
    fn header_on_gpu(&self, peer: usize, number: u32) -> Option<CallHeader> {
        ask::ask(&[self.control.gpu_page(peer)]);
        let view = self.control.gpu_view(peer, &clock())?;
        Some(view.calls.iter().find(|call| call.number == number)?.header)
    }

    /// Names the first call in which `peer` and we differ, as far back as both still have it, and fails everybody.
    #[cold]
    pub(super) fn mismatch(&self, peer: usize, epoch: u64) -> Error {
        let theirs = self.control.rank(peer).slots;
        // Before we have published the current call, its slot holds one that is [`CALL_SLOTS`] calls older.
        let has_arrived = self.control.rank(self.rank).slots.standing(self.epoch) == self.epoch;
        let oldest = self.epoch.saturating_sub(CALL_SLOTS as u64 - u64::from(has_arrived)).max(1);
        let ours = |at: u64| if at == self.epoch { &self.current } else { &self.headers[slot_of(at)] };
        let read = |at: u64| std::array::from_fn(|word| theirs.read(at, SLOT_HEADER + word));
        let differs = |at: &u64| {
            theirs.standing(*at) == *at
                && CallHeader::fingerprint(&read(*at)) != CallHeader::fingerprint(ours(*at))
        };
        let at = (oldest..=self.epoch).find(differs).unwrap_or(epoch);
        let describe = |words: &[u64; HEADER_WORDS], rank: usize| match CallHeader::from_words(words) {
            Some(header) => header.describe(at - 1, rank as u32),
            None => format!("an unknown call #{} on rank {rank}", at - 1),
        };
        self.abort_with(Cause::Mismatch {
            left: describe(ours(at), self.rank),
            right: describe(&read(at), peer),
        })
    }
}

#[cfg(all(test, feature = "cuda"))]
#[path = "disagreement_tests.rs"]
mod tests;
