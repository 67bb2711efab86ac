//! What a call waits for, and how.
//!
//! Collectives and messages are written so that they can stop at any wait and be taken up again later: what they have
//! done so far is in their [`State`](super::engine::State), and a wait that must not block ends them with [`Halt::Pending`].
//! A blocking call waits on the spot; so there is one code for both.
//!
//! Every wait ends: by the abort word, by patience, or because a look at all peers, each [`LOOK_EVERY`], shows that they
//! have made other calls, or that their words make no sense.

use std::time::{Duration, Instant};

use unisono_sync::{EpochFlag, Stopped, WaitPolicy, Watch, wait};

use super::damage::STEPS_AHEAD;
use super::engine::Engine;
use super::messages::HEADER_BYTES;
use crate::cause::Cause;
use crate::error::{Error, Result};

/// How long a wait goes on before it looks for ranks that made different calls: longer than any good wait for a peer that
/// has arrived.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a wait goes on before it looks for ranks whose GPUs wait for this one, which tell that after as long.
#[cfg(feature = "cuda")]
const IS_STUCK: Duration = Duration::from_millis(500);

/// A word of a peer that must reach a value before a call can go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Blocked {
    pub(super) peer: usize,
    pub(super) on: On,
    pub(super) value: u64,
}

/// Which word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum On {
    /// Its slot of an epoch.
    Slot,
    /// Its steps staged.
    Produced,
    /// Its steps reduced.
    Reduced,
    /// Its steps consumed.
    Consumed,
    /// Its calls completed.
    Completed,
    /// Bytes that it sent us and that we have not read.
    News,
    /// Room for bytes to it.
    Room,
}

impl On {
    /// Whether it is a word of a channel, which messages wait for.
    pub(super) const fn is_of_messages(self) -> bool {
        matches!(self, Self::News | Self::Room)
    }
}

/// Why a call stops half-way.
#[derive(Debug)]
pub(super) enum Halt {
    /// It waits, and must not block.
    Pending(Blocked),
    /// It failed.
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What a part of a call comes to.
pub(super) type Step<T> = std::result::Result<T, Halt>;

/// How long something has waited without any progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vigil {
    since: Instant,
    warned: bool,
}

impl Vigil {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), warned: false }
    }

    /// Whether it has lasted so long that peers should be looked at.
    fn is_long(&self) -> bool {
        self.since.elapsed() >= LOOK_EVERY
    }
}

impl Engine {
    /// Goes on once `value` is reached: waits here, or, where that is not allowed, says what for.
    #[inline(always)]
    pub(super) fn until(&self, peer: usize, on: On, value: u64) -> Step<()> {
        let blocked = Blocked { peer, on, value };
        if self.is_ready(blocked) {
            return Ok(());
        }
        if self.polling {
            return Err(Halt::Pending(blocked));
        }
        Ok(self.wait_for(blocked)?)
    }

    /// Whether the wait is over.
    #[inline(always)]
    pub(super) fn is_ready(&self, blocked: Blocked) -> bool {
        let Blocked { peer, on, value } = blocked;
        let theirs = self.control.rank(peer);
        match on {
            On::Slot => theirs.slots.is_published(value),
            On::Produced => theirs.produced.is_within(value, STEPS_AHEAD),
            On::Reduced => theirs.reduced.is_within(value, STEPS_AHEAD),
            On::Consumed => theirs.consumed.is_within(value, STEPS_AHEAD),
            On::Completed => self.completed(peer, theirs.trail.current()) >= value,
            On::News => self.unread(peer) as u64 >= value,
            On::Room => self.room(peer) >= HEADER_BYTES,
        }
    }

    /// What to sleep on.
    fn watch(&self, blocked: Blocked) -> Watch<'_> {
        let theirs = self.control.rank(blocked.peer);
        let flag = match blocked.on {
            On::Slot => EpochFlag::new(theirs.slots.word(blocked.value)),
            On::Produced => theirs.produced,
            On::Reduced => theirs.reduced,
            On::Consumed => theirs.consumed,
            On::Completed => theirs.trail,
            On::News => self.channel_from(blocked.peer).head,
            On::Room => self.channel_to(blocked.peer).tail,
        };
        let (abort, sleepers) = (self.control.abort(), theirs.sleepers);
        Watch { abort, word: flag.word(), sleepers, budget: &self.budget }
    }

    /// Spins until something of `from` is unread, as long as spinning pays; whether something is.
    pub(super) fn spin_for_news(&self, from: usize) -> bool {
        let blocked = Blocked { peer: from, on: On::News, value: HEADER_BYTES as u64 };
        let ready = || self.is_ready(blocked);
        let spin = WaitPolicy { yield_for: Duration::ZERO, patience: Some(Duration::ZERO), ..self.policy };
        ready() || wait(&spin, self.watch(blocked), ready, || {}).is_ok()
    }

    /// Waits until `blocked` is over.
    #[inline(always)]
    fn wait_for(&self, blocked: Blocked) -> Result<()> {
        let ready = || self.is_ready(blocked);
        wait(&self.slice(LOOK_EVERY), self.watch(blocked), ready, || {})
            .or_else(|stopped| self.wait_on(blocked, &ready, stopped))
    }

    /// Waits on after a wait that `stopped`.
    #[cold]
    fn wait_on(&self, blocked: Blocked, ready: &dyn Fn() -> bool, stopped: Stopped) -> Result<()> {
        let mut vigil = Vigil::new();
        let mut stopped = stopped;
        if let Stopped::TimedOut { waited } = stopped {
            vigil.since = vigil.since.checked_sub(waited).unwrap_or(vigil.since);
        }
        loop {
            self.keep(&mut vigil, blocked, stopped)?;
            let asleep = WaitPolicy { spins: 0, yield_for: Duration::ZERO, ..self.slice(LOOK_EVERY) };
            match wait(&asleep, self.watch(blocked), ready, || {}) {
                Ok(()) => {
                    self.record_wait_over();
                    return Ok(());
                }
                Err(again) => stopped = again,
            }
        }
    }

    /// Waits a while until `is_over`, which is true once any of `blocked` is, and may be true for other reasons. Sleeps
    /// on the first of them.
    pub(super) fn wait_a_while(
        &self,
        vigil: &mut Option<Vigil>,
        blocked: Blocked,
        is_over: &dyn Fn() -> bool,
    ) -> Result<()> {
        let vigil = vigil.get_or_insert_with(Vigil::new);
        let mut policy = self.slice(LOOK_EVERY);
        if vigil.is_long() {
            policy = WaitPolicy { spins: 0, yield_for: Duration::ZERO, ..policy };
        }
        match wait(&policy, self.watch(blocked), is_over, || {}) {
            Ok(()) => Ok(()),
            Err(stopped) => self.keep(vigil, blocked, stopped),
        }
    }

    /// For who asks again and again instead of waiting: fails as a wait would.
    pub(super) fn look(&self, vigil: &mut Option<Vigil>, blocked: Blocked) -> Result<()> {
        if self.control.abort().raised().is_some() {
            // What was announced before the abort counts all the same.
            return if self.is_ready(blocked) { Ok(()) } else { Err(self.first_cause(blocked)) };
        }
        let vigil = vigil.get_or_insert_with(Vigil::new);
        let waited = vigil.since.elapsed();
        if vigil.is_long() { self.keep(vigil, blocked, Stopped::TimedOut { waited }) } else { Ok(()) }
    }

    /// After a wait that `stopped`: looks at all peers, warns, and gives up in time.
    #[cold]
    fn keep(&self, vigil: &mut Vigil, blocked: Blocked, stopped: Stopped) -> Result<()> {
        if stopped == Stopped::Aborted {
            return Err(self.first_cause(blocked));
        }
        self.record_wait(blocked);
        for other in self.peers() {
            self.compare(other).map_err(|at| self.mismatch(other, at))?;
        }
        #[cfg(feature = "cuda")]
        if vigil.since.elapsed() >= IS_STUCK
            && let Some(error) = self.meets_on_gpu(blocked)
        {
            return Err(error);
        }
        if let Some(cause) = self.damage(blocked) {
            self.control.fail(&cause);
            return Err(self.first_cause(blocked));
        }
        if let Some(reason) = self.interrupt.as_ref().and_then(|ask| ask()) {
            self.control.fail(&Cause::Aborted { rank: self.rank as u32, reason });
            return Err(self.first_cause(blocked));
        }
        let waited = vigil.since.elapsed();
        if self.policy.patience.is_some_and(|patience| waited >= patience) {
            let cause = Cause::TimedOut {
                rank: self.rank as u32,
                call: self.during(blocked),
                waited_ms: waited.as_millis() as u64,
                missing: self.missing(blocked),
            };
            self.control.fail(&cause);
            return Err(self.first_cause(blocked));
        }
        if !vigil.warned && self.policy.warn_after.is_some_and(|after| waited >= after) {
            vigil.warned = true;
            let (call, missing) = (self.during(blocked), self.missing(blocked).join(", "));
            tracing::warn!("rank {} has waited {waited:.1?} in {call} for {missing}", self.rank);
        }
        Ok(())
    }

    /// The usual manner of waiting, for at most `time`.
    #[inline(always)]
    fn slice(&self, time: Duration) -> WaitPolicy {
        let patience = self.policy.patience.map_or(time, |patience| patience.min(time));
        WaitPolicy { patience: Some(patience), warn_after: None, ..self.policy }
    }

    /// Whether `peer` has not begun this call.
    pub(super) fn is_late(&self, peer: usize) -> bool {
        self.control.rank(peer).slots.standing(self.epoch) < self.epoch
    }

    /// The ranks that have not begun this call; if all have, or a message is waited for, that one.
    fn missing(&self, blocked: Blocked) -> Vec<String> {
        let is_missing = |peer: &usize| !blocked.on.is_of_messages() && self.is_late(*peer);
        let mut missing: Vec<usize> = self.peers().filter(is_missing).collect();
        missing.sort_unstable();
        if missing.is_empty() {
            missing.push(blocked.peer);
        }
        missing.into_iter().map(|peer| self.control.name(peer).to_owned()).collect()
    }

    /// What this rank does that waits: `all_reduce #812`.
    pub(super) fn during(&self, blocked: Blocked) -> String {
        if blocked.on.is_of_messages() { self.message_during(blocked) } else { self.call_name() }
    }

    /// The error of the first cause, as who waits so meets it.
    #[cold]
    fn first_cause(&self, blocked: Blocked) -> Error {
        self.cause_during(&self.during(blocked))
    }
}
