//! Waits that end when ranks have made different calls, and what to say then.
//!
//! Whoever reads a peer's data compares chains before. That is not enough: a rank that only sends may wait for credit of
//! a peer that waits for another call of ours. So a wait looks every [`LOOK_EVERY`] whether all peers still do what we
//! do, and so does whoever takes credit for its slot. Ranks that differ see it at the latest sixteen calls later.

use std::time::Duration;

use unisono_core::call::{CallHeader, HEADER_WORDS};
use unisono_core::layout::{CALL_SLOTS, SLOT_CHAIN, SLOT_HEADER};
use unisono_sync::{Stopped, WaitPolicy, Watch, wait};

use super::engine::{Engine, HISTORY, slot_of};
use crate::cause::Cause;
use crate::error::{Error, Result};

/// How long a wait goes on before it looks for ranks that made different calls: longer than any good wait for a peer that
/// has arrived.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Engine {
    /// Waits until `ready`, which becomes true by a change of `watch.word`, a word of `peer`.
    #[inline(always)]
    pub(super) fn wait_until(&self, peer: usize, watch: Watch<'_>, ready: impl Fn() -> bool) -> Result<()> {
        let patience = self.policy.patience.map_or(LOOK_EVERY, |patience| patience.min(LOOK_EVERY));
        let policy = WaitPolicy { patience: Some(patience), warn_after: None, ..self.policy };
        wait(&policy, watch, &ready, || {}).or_else(|stopped| self.wait_on(peer, watch, &ready, stopped))
    }

    /// Waits on after `stopped`: looks at all peers, warns and gives up in time.
    #[cold]
    fn wait_on(
        &self,
        peer: usize,
        watch: Watch<'_>,
        ready: &dyn Fn() -> bool,
        mut stopped: Stopped,
    ) -> Result<()> {
        let (mut waited, mut warn_after) = (Duration::ZERO, self.policy.warn_after);
        loop {
            let Stopped::TimedOut { waited: now } = stopped else { return Err(self.first_cause()) };
            waited += now;
            for other in self.peers() {
                self.compare(other).map_err(|at| self.mismatch(other, at))?;
            }
            let left = self.policy.patience.map_or(LOOK_EVERY, |patience| patience.saturating_sub(waited));
            if left.is_zero() {
                return Err(self.abort_with(Cause::TimedOut {
                    rank: self.rank as u32,
                    call: self.during(),
                    waited_ms: waited.as_millis() as u64,
                    missing: self.missing(peer),
                }));
            }
            if warn_after.is_some_and(|after| waited >= after) {
                warn_after = None;
                self.warn(peer);
            }
            let patience = Some(left.min(LOOK_EVERY));
            let policy = WaitPolicy { spins: 0, yield_for: Duration::ZERO, patience, warn_after: None };
            match wait(&policy, watch, ready, || {}) {
                Ok(()) => return Ok(()),
                Err(again) => stopped = again,
            }
        }
    }

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

    /// Names the first call in which `peer` and we differ, as far back as both still have it, and fails everybody.
    #[cold]
    pub(super) fn mismatch(&self, peer: usize, epoch: u64) -> Error {
        let theirs = self.control.rank(peer).slots;
        // Before we have published the current call, its slot holds one that is sixteen calls older.
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
