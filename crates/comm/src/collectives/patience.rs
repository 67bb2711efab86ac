//! Waiting for peers: how long, what is looked at meanwhile, and who is named when it was in vain.
//!
//! A wait that lasts is cut into pieces of [`LOOK`]; between them it looks whether a peer makes another call than we do.

use std::time::Duration;

use unisono_core::layout::SLOT_CHAIN;
use unisono_sync::{Stopped, WaitPolicy, Watch, wait};

use super::engine::Engine;
use crate::cause::Cause;
use crate::error::{Error, Result};

/// How often a wait that lasts looks at what the peers do.
const LOOK: Duration = Duration::from_millis(100);

/// `policy` up to the first look at what the peers do.
pub(super) fn first_look(policy: &WaitPolicy) -> WaitPolicy {
    WaitPolicy {
        patience: Some(policy.patience.map_or(LOOK, |patience| patience.min(LOOK))),
        warn_after: policy.warn_after.filter(|after| *after <= LOOK),
        ..*policy
    }
}

impl Engine {
    /// Waits for `peer`. A wait that lasts looks now and then whether a peer made another call than ours: a root that
    /// waits for credit hears nobody, and the others may wait for its next call.
    #[inline]
    pub(super) fn wait_patiently(
        &self,
        peer: usize,
        watch: Watch<'_>,
        ready: impl Fn() -> bool,
    ) -> Result<()> {
        match wait(&self.first_look, watch, &ready, || self.warn(peer)) {
            Ok(()) => Ok(()),
            Err(Stopped::TimedOut { waited }) => self.wait_long(peer, watch, &ready, waited),
            Err(Stopped::Aborted) => Err(self.first_cause()),
        }
    }

    #[cold]
    fn wait_long(
        &self,
        peer: usize,
        watch: Watch<'_>,
        ready: &dyn Fn() -> bool,
        mut waited: Duration,
    ) -> Result<()> {
        let mut warn_after = self.policy.warn_after.filter(|after| *after > LOOK);
        loop {
            self.look_for_other_calls()?;
            let left = self.policy.patience.map_or(LOOK, |patience| patience.saturating_sub(waited));
            if left.is_zero() {
                return Err(self.timed_out(peer, waited));
            }
            if warn_after.is_some_and(|after| waited >= after) {
                warn_after = None;
                self.warn(peer);
            }
            let policy = WaitPolicy {
                spins: 0,
                yield_for: Duration::ZERO,
                patience: Some(left.min(LOOK)),
                warn_after: None,
            };
            match wait(&policy, watch, ready, || ()) {
                Ok(()) => return Ok(()),
                Err(Stopped::TimedOut { waited: more }) => waited += more,
                Err(Stopped::Aborted) => return Err(self.first_cause()),
            }
        }
    }

    /// Fails if a peer stands in a call of the same number as ours with another chain. A peer keeps the slot of our
    /// current call until we have completed it.
    fn look_for_other_calls(&self) -> Result<()> {
        if !self.control.rank(self.rank).slots.is_published(self.epoch) {
            return Ok(());
        }
        for peer in self.peers() {
            let slots = self.control.rank(peer).slots;
            if slots.is_published(self.epoch) && slots.read(self.epoch, SLOT_CHAIN) != self.chain {
                return Err(self.mismatch(peer, self.epoch));
            }
        }
        Ok(())
    }

    /// The ranks that have not begun this call; if all have, the one that is waited for.
    fn missing(&self, waited_for: usize) -> Vec<String> {
        let late = |peer: &usize| {
            let standing = self.control.rank(*peer).slots.standing(self.epoch);
            standing < self.epoch
        };
        let mut missing: Vec<String> =
            self.peers().filter(late).map(|peer| self.control.name(peer).to_owned()).collect();
        missing.sort();
        if missing.is_empty() { vec![self.control.name(waited_for).to_owned()] } else { missing }
    }

    #[cold]
    fn warn(&self, peer: usize) {
        let waited = self.policy.warn_after.unwrap_or_default();
        tracing::warn!(
            "rank {} has waited {waited:?} in {} for {}",
            self.rank,
            self.during(),
            self.missing(peer).join(", ")
        );
    }

    #[cold]
    fn timed_out(&self, peer: usize, waited: Duration) -> Error {
        self.abort_with(Cause::TimedOut {
            rank: self.rank as u32,
            call: self.during(),
            waited_ms: waited.as_millis() as u64,
            missing: self.missing(peer),
        })
    }
}
