//! The rounds of a buffer on the host: each rank writes into its own copy of the arena, announces that, and reads what the others wrote.
//!
//! Rounds are numbered for ever and equally on all ranks; every call is one or more of them. Rows and weights have two halves each, which
//! their rounds use in turn, so a rank writes a round while others still read the one before. It waits only for those that have not yet read
//! what lay in that half before (`consumed`).
//!
//! With masking, a rank that died or is silent for too long is closed: its attendance says in how many rounds it took part, once and for
//! all, so all survivors leave it out from the same round on. Failures of the communicator by such a death do not end these waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisono_core::ep::{ArenaLayout, CALL_WORDS, CALLS};
use unisono_core::layout::Field;
use unisono_sync::attendance::before_overwriting;
use unisono_sync::memory::{words32, words64};
use unisono_sync::{
    AbortWord, Attendance, EpochFlag, SharedBytes, Sleepers, SpinBudget, Standing, Stopped, WaitPolicy,
    Watch, wait,
};

use super::tensor::{Tensor, bytes_of, bytes_of_mut};
use super::words::CallWords;
use crate::cause::Cause;
use crate::collectives::Interrupt;
use crate::communicator::Communicator;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::neighbours::Neighbours;
use crate::symmetric::Symmetric;

/// How long a wait goes on before it looks at what else may have happened.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How much longer than later ones the first call waits: ranks load and compile at first.
const FIRST_CALL: u32 = 10;

/// What a round carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lane {
    Data,
    Weights,
}

/// A round that this rank takes part in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Round {
    pub(super) number: u64,
    /// Which half of its lane it uses.
    pub(super) half: usize,
}

/// What a peer is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum On {
    /// That it sends a round, or is closed.
    Sent,
    /// That it has read a round, or is closed.
    Consumed,
}

/// Who took part in a round, by bits of ranks, and what they said.
#[derive(Clone, Debug)]
pub(super) struct Gathered {
    pub(super) present: u64,
    pub(super) calls: Vec<CallWords>,
    /// How long each rank was waited for.
    waited: Vec<Duration>,
}

impl Gathered {
    /// i64 `[ranks]`: how long each rank was waited for, in nanoseconds.
    pub(super) fn waited(&self) -> Tensor {
        let waited: Vec<i64> = self.waited.iter().map(|waited| waited.as_nanos() as i64).collect();
        Tensor::of(&waited, &[waited.len()])
    }
}

/// Asked by waits that last, as those of the communicator are.
struct Asked(Option<Interrupt>);

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Asked").field(&self.0.is_some()).finish()
    }
}

/// This rank's side of the arena.
#[derive(Debug)]
pub(super) struct Arena {
    control: Arc<Control>,
    neighbours: Neighbours,
    memory: Symmetric<u64>,
    /// The window that became it.
    id: u64,
    layout: ArenaLayout,
    policy: WaitPolicy,
    budget: SpinBudget,
    asked: Asked,
    masking: bool,
    deadline: Duration,
    rank: usize,
    world_size: usize,
    /// Rounds begun.
    round: u64,
    /// The round that last used each half of each lane.
    uses: [[u64; 2]; 2],
    turns: [usize; 2],
    /// Rounds begun and not read, and whether each is read behind an earlier one.
    open: VecDeque<(u64, bool)>,
    /// Ranks that are left out.
    masked: u64,
    /// Whether all have taken part in a round, so that nobody has to load or compile any more.
    pub(super) has_met: bool,
}

impl Arena {
    /// Makes the arena on all ranks. Collective.
    pub(super) fn make(
        communicator: &Communicator,
        layout: ArenaLayout,
        (masking, deadline): (bool, Duration),
    ) -> Result<Self> {
        let window = communicator.window(layout.total_bytes().div_ceil(8), crate::Memory::Host)?;
        let id = window.id();
        let memory = window.into_symmetric(communicator)?;
        let policy = communicator.engine().policy();
        let interrupt = communicator.engine().interrupt();
        Ok(Self {
            control: communicator.control.clone(),
            neighbours: communicator.neighbours.clone(),
            memory,
            id,
            layout,
            policy,
            budget: SpinBudget::new(&policy),
            asked: Asked(interrupt),
            masking,
            deadline,
            rank: communicator.rank(),
            world_size: communicator.world_size(),
            round: 0,
            uses: [[0; 2]; 2],
            turns: [0; 2],
            open: VecDeque::new(),
            masked: 0,
            has_met: false,
        })
    }

    /// Ends it on all ranks. Collective.
    pub(super) fn close(self, communicator: &Communicator) -> Result<()> {
        self.memory.close(communicator)
    }

    pub(super) const fn layout(&self) -> &ArenaLayout {
        &self.layout
    }

    /// The ranks that are left out, by bits; ours too, if others left it out.
    pub(super) fn masked(&self) -> u64 {
        self.masked | u64::from(!self.attendance(self.rank).was_open()) << self.rank
    }

    /// Rounds that were begun and are not read.
    pub(super) fn open_rounds(&self) -> usize {
        self.open.iter().filter(|(_, is_read)| !is_read).count()
    }

    /// Whether `round` is the oldest that is not read.
    pub(super) fn is_next(&self, round: Round) -> bool {
        self.open.iter().find(|(_, is_read)| !is_read).is_some_and(|(number, _)| *number == round.number)
    }

    /// Ok, or why no call can be made: a fork, another generation, a failure.
    pub(super) fn check(&self, call: &str) -> Result<()> {
        self.control.check_process()?;
        if let Some(error) = self.control.outdated(self.id) {
            return Err(error);
        }
        self.check_failures(&format!("{call} of an ep::Buffer"))
    }

    /// Begins the next round: waits until its half is free to be written.
    pub(super) fn begin(&mut self, lane: Lane, during: &str) -> Result<Round> {
        self.round += 1;
        let at = lane as usize;
        let half = self.turns[at];
        let before = std::mem::replace(&mut self.uses[at][half], self.round);
        self.turns[at] = 1 - half;
        let free = before.max(self.round.saturating_sub(CALLS as u64));
        for peer in self.peers() {
            self.wait_for(peer, On::Consumed, free, during)?;
        }
        before_overwriting();
        let round = Round { number: self.round, half };
        self.open.push_back((round.number, false));
        Ok(round)
    }

    /// Tells the others that what this rank wrote for `round` is there.
    pub(super) fn publish(&self, round: Round, call: &CallWords, during: &str) -> Result<()> {
        self.write(self.call_field(round.number).offset, bytes_of(&call.to_words(round.number)));
        let attendance = self.attendance(self.rank);
        if !attendance.attend(round.number) {
            return Err(self.given_up(during));
        }
        self.sleepers(self.rank).wake(attendance.word());
        Ok(())
    }

    /// Waits for all others, and compares what each says that `round` belongs to.
    pub(super) fn gather(&mut self, round: Round, call: &CallWords, during: &str) -> Result<Gathered> {
        let mut gathered =
            Gathered { present: 1 << self.rank, calls: vec![*call; self.world_size], waited: Vec::new() };
        gathered.waited.resize(self.world_size, Duration::ZERO);
        for peer in self.peers() {
            let start = Instant::now();
            let is_there = self.wait_for(peer, On::Sent, round.number, during)?;
            gathered.waited[peer] = start.elapsed();
            if !is_there {
                continue;
            }
            let mut words = [0u64; CALL_WORDS];
            self.read(peer, self.call_field(round.number).offset, bytes_of_mut(&mut words));
            let theirs = CallWords::from_words(&words);
            if theirs.to_words(words[CallWords::ROUND]) != words || words[CallWords::ROUND] != round.number {
                return Err(self.damaged(peer, "what its round belongs to makes no sense", during));
            }
            if !theirs.fits(call) {
                let cause = Cause::Mismatch { left: call.describe(self.rank), right: theirs.describe(peer) };
                return Err(self.fail(cause, during));
            }
            gathered.calls[peer] = theirs;
            gathered.present |= 1 << peer;
        }
        self.has_met = true;
        Ok(gathered)
    }

    /// This rank has read all that it wants of `round`.
    pub(super) fn finish(&mut self, round: Round, during: &str) -> Result<()> {
        if !self.attendance(self.rank).was_open() {
            return Err(self.given_up(during));
        }
        for (number, is_read) in &mut self.open {
            *is_read |= *number == round.number;
        }
        let mut consumed = None;
        while let Some((number, true)) = self.open.front().copied() {
            consumed = Some(number);
            self.open.pop_front();
        }
        if let Some(consumed) = consumed {
            let flag = self.consumed(self.rank);
            flag.publish(consumed);
            self.sleepers(self.rank).wake(flag.word());
        }
        Ok(())
    }

    /// Leaves `rank` out of all rounds that it has not sent.
    pub(super) fn mask(&mut self, rank: usize) {
        self.close_attendance(rank);
        self.masked |= 1 << rank;
    }

    /// Writes to our copy.
    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        self.bytes_of(self.rank).write(at, bytes);
    }

    /// Reads `peer`'s copy, which may be ours.
    pub(super) fn read(&self, peer: usize, at: usize, bytes: &mut [u8]) {
        self.bytes_of(peer).read(at, bytes);
    }

    /// What lies in a peer's memory is no work of this library: the failure of all.
    pub(super) fn damaged(&self, peer: usize, word: &str, during: &str) -> Error {
        let who = self.control.name(peer).to_owned();
        self.fail(Cause::Damaged { rank: self.rank as u32, who, word: word.to_owned() }, during)
    }

    /// Fails the communicator (if it has not failed) and this buffer on all ranks.
    pub(super) fn fail(&self, cause: Cause, during: &str) -> Error {
        self.control.fail(&cause);
        // If the communicator had failed by a masked death, only this tells the others.
        if self.masking {
            self.failure().raise(self.rank as u32);
        }
        cause.into_error(during, self.control.member())
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, masked) = (self.rank, self.masked);
        (rank + 1..self.world_size).chain(0..rank).filter(move |peer| masked >> peer & 1 == 0)
    }

    /// Whether what is waited for has come; false if `peer` is closed before it.
    fn wait_for(&mut self, peer: usize, on: On, round: u64, during: &str) -> Result<bool> {
        let start = Instant::now();
        let limit = if self.has_met { self.deadline } else { self.deadline.saturating_mul(FIRST_CALL) };
        let mut policy = WaitPolicy { warn_after: None, ..self.policy };
        while !self.is_ready(peer, on, round) {
            policy.patience = Some(LOOK_EVERY.min(limit.saturating_sub(start.elapsed())));
            let word = match on {
                On::Sent => self.attendance(peer).word(),
                On::Consumed => self.consumed(peer).word(),
            };
            let abort = if self.masking { self.failure() } else { self.control.abort() };
            let watch = Watch { abort, word, sleepers: self.sleepers(peer), budget: &self.budget };
            let ready = || self.is_ready(peer, on, round);
            if let Err(stopped) = wait(&policy, watch, ready, || {}) {
                self.look((peer, on, round), stopped, (start.elapsed(), limit), during)?;
            }
            policy = WaitPolicy { spins: 0, yield_for: Duration::ZERO, ..policy };
        }
        let standing = self.attendance(peer).standing();
        // Also one that sent this round: it will send no other.
        let is_there = standing.rounds >= round || on == On::Consumed;
        if standing.is_closed && !is_there {
            self.masked |= 1 << peer;
        }
        Ok(is_there)
    }

    fn is_ready(&self, peer: usize, on: On, round: u64) -> bool {
        let Standing { rounds, is_closed } = self.attendance(peer).standing();
        let has = match on {
            On::Sent => rounds,
            On::Consumed => self.consumed(peer).current(),
        };
        is_closed || has.wrapping_sub(round) <= CALLS as u64
    }

    /// After a wait that stopped: fails, gives up who is lost or silent, or lets the wait go on.
    #[cold]
    fn look(
        &self,
        (peer, on, round): (usize, On, u64),
        stopped: Stopped,
        (waited, limit): (Duration, Duration),
        during: &str,
    ) -> Result<()> {
        self.check_failures(during)?;
        if stopped == Stopped::Aborted {
            return Err(self.first_cause(during));
        }
        if let Some(reason) = self.asked.0.as_ref().and_then(|ask| ask()) {
            return Err(self.fail(Cause::Aborted { rank: self.rank as u32, reason }, during));
        }
        let standing = self.attendance(peer).standing();
        let word = if on == On::Sent { standing.rounds } else { self.consumed(peer).current() };
        if !standing.is_closed && word > round && word.wrapping_sub(round) > CALLS as u64 {
            let what = format!("it counts {word} rounds of an ep::Buffer where {round} are due");
            return Err(self.damaged(peer, &what, during));
        }
        let is_late = waited >= limit;
        if self.masking {
            if is_late || self.is_lost(peer) {
                self.close_attendance(peer);
            }
            return Ok(());
        }
        if is_late {
            let late = |peer: &usize| !self.is_ready(*peer, on, round);
            let mut missing: Vec<usize> = self.peers().filter(late).collect();
            missing.sort_unstable();
            let cause = Cause::TimedOut {
                rank: self.rank as u32,
                call: format!("{during} (ep::Settings::deadline {:?})", self.deadline),
                waited_ms: waited.as_millis() as u64,
                missing: missing.into_iter().map(|peer| self.control.name(peer).to_owned()).collect(),
            };
            return Err(self.fail(cause, during));
        }
        Ok(())
    }

    /// Failures that end every call. With masking, deaths do not.
    fn check_failures(&self, during: &str) -> Result<()> {
        if self.masking {
            if !self.attendance(self.rank).was_open() {
                return Err(self.given_up(during));
            }
            if let Some(rank) = self.failure().raised() {
                let reason = "its ep::Buffer failed".to_owned();
                return Err(Error::Aborted { rank: rank as usize, during: during.to_owned(), reason });
            }
        }
        match self.control.cause() {
            // Who left may have done its part; the wait that misses it says so.
            None | Some(Cause::Dropped { .. }) => Ok(()),
            Some(Cause::Died { rank, .. }) if self.masking && rank as usize != self.rank => Ok(()),
            Some(cause) => Err(cause.into_error(during, self.control.member())),
        }
    }

    fn first_cause(&self, during: &str) -> Error {
        let unknown = || Cause::Aborted { rank: self.rank as u32, reason: "unknown".to_owned() };
        self.control.cause().unwrap_or_else(unknown).into_error(during, self.control.member())
    }

    fn given_up(&self, during: &str) -> Error {
        let how = "its ep::Buffer was left out by them".to_owned();
        Error::GivenUp { rank: self.rank, during: during.to_owned(), how }
    }

    /// Whether its process is gone or stands still, or its communicator has ended.
    fn is_lost(&self, peer: usize) -> bool {
        self.neighbours.lost(peer).is_some() || self.control.fate(peer).settled().is_some()
    }

    fn close_attendance(&self, peer: usize) {
        let attendance = self.attendance(peer);
        attendance.close();
        self.sleepers(peer).wake(attendance.word());
        self.sleepers(peer).wake(self.consumed(peer).word());
    }

    fn call_field(&self, round: u64) -> Field {
        let bytes = CALL_WORDS * 8;
        Field { offset: self.layout.calls.offset + round as usize % CALLS * bytes, bytes }
    }

    fn start(&self, peer: usize) -> *mut u8 {
        // The peer is below the world size, so it has a copy.
        let address = self.memory.address(peer).unwrap_or_default();
        std::ptr::with_exposed_provenance_mut(address as usize)
    }

    fn at(&self, peer: usize, field: Field) -> *mut u8 {
        // SAFETY: the field lies in the copy, whose length was agreed and which `memory` keeps mapped.
        unsafe { self.start(peer).add(field.offset) }
    }

    fn bytes_of(&self, peer: usize) -> SharedBytes<'_> {
        let words = self.layout.total_bytes().div_ceil(8);
        // SAFETY: a copy begins on a page, has so many words and lives as long as `memory`; all ranks touch it by atomics only.
        SharedBytes::new(unsafe { words64(self.start(peer), words) })
    }

    fn attendance(&self, peer: usize) -> Attendance<'_> {
        // SAFETY: as above; this word is accessed as a 64-bit atomic only.
        Attendance::new(unsafe { &words64(self.at(peer, self.layout.attendance), 1)[0] })
    }

    fn consumed(&self, peer: usize) -> EpochFlag<'_> {
        // SAFETY: as above.
        EpochFlag::new(unsafe { &words64(self.at(peer, self.layout.consumed), 1)[0] })
    }

    fn sleepers(&self, peer: usize) -> Sleepers<'_> {
        // SAFETY: as above; the count is accessed as a 32-bit atomic only.
        Sleepers::new(unsafe { &words32(self.at(peer, self.layout.sleepers), 1)[0] })
    }

    fn failure(&self) -> AbortWord<'_> {
        // SAFETY: as above.
        AbortWord::new(unsafe { &words32(self.at(0, self.layout.failure), 1)[0] })
    }
}
