//! The engine: epochs, chains and credits; what every collective is made of.
//!
//! One call goes: check the buffers, take credit for the slot, publish it (with the first data), hear the peers it
//! reads from, move on. The fast path of an 8-byte all-reduce is one published line, one polled line per peer and some
//! tens of nanoseconds of bookkeeping: no lock, no allocation, no system call.
//!
//! Over 500 lines because one engine serves every kind of call, on the host and for GPUs.

use std::sync::Arc;
use std::time::Duration;

use unisono_core::call::{CallHeader, HEADER_WORDS, Kind};
use unisono_core::layout::{
    CALL_SLOTS, CHUNK_BYTES, CHUNKS, INLINE_WORDS, SLOT_CHAIN, SLOT_DATA, SLOT_HEADER,
};
use unisono_core::select::{self, Rules};
use unisono_sync::{EpochFlag, SpinBudget, WaitPolicy};

use super::flight::Flight;
use super::fused::RowMemory;
use super::messages::Messages;
use super::plan::{FindWindow, Plan, Situation};
use super::quantised::BlockMemory;
use super::recorder::Recorder;
use super::waiting::{Halt, On, Step};
use super::windows::Windows;
use crate::call::Call;
use crate::cause::Cause;
use crate::control::{Control, RankWords};
use crate::error::{Error, Result};

/// Calls whose chain is remembered, to compare with what peers' trails say: more than any peer can be behind.
pub(super) const HISTORY: u64 = 4 * CALL_SLOTS as u64;

/// Asked again and again while a call waits; an answer is the reason why it must not wait on.
pub(crate) type Interrupt = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// How an engine is made.
pub(crate) struct EngineConfig {
    pub(crate) control: Arc<Control>,
    pub(crate) rank: usize,
    pub(crate) policy: WaitPolicy,
    pub(crate) rules: Rules,
    pub(crate) generation: u32,
}

/// What is known of a peer without looking.
#[derive(Clone, Copy, Default)]
pub(super) struct Known {
    pub(super) epoch: u64,
    step: u64,
}

/// How far a collective has come, so that it can be taken up again where it stopped.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct State {
    /// Whether it has its number.
    has_begun: bool,
    /// What of the current turn is done; what it means is each collective's own.
    pub(super) phase: u8,
    /// Blocks begun.
    pub(super) turn: u64,
    /// Peers that are done with in the current phase.
    pub(super) peers: usize,
    /// Whether the sizes of all parts were exchanged.
    pub(super) knows_sizes: bool,
}

/// One rank's side of all collectives of one communicator. Used by one thread at a time.
pub(crate) struct Engine {
    pub(super) control: Arc<Control>,
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) policy: WaitPolicy,
    pub(super) budget: SpinBudget,
    /// Whether a wait ends the call as pending instead of blocking.
    pub(super) polling: bool,
    rules: Rules,
    /// Calls begun; the current one, while one runs.
    pub(super) epoch: u64,
    pub(super) chain: u64,
    /// Steps of all calls before the current one.
    pub(super) step: u64,
    pub(super) known: Vec<Known>,
    /// The least of what is known of all peers.
    credit: Known,
    pub(super) chains: [u32; HISTORY as usize],
    /// The headers that our call slots hold.
    pub(super) headers: [[u64; HEADER_WORDS]; CALL_SLOTS],
    /// The header of the current call, which may not have been published yet.
    pub(super) current: [u64; HEADER_WORDS],
    failed: Option<Error>,
    /// Calls that were posted and are not complete.
    pub(super) flight: Flight,
    pub(super) messages: Messages,
    pub(super) recorder: Recorder,
    pub(super) windows: Windows,
    generation: u32,
    /// Inline data of all ranks in the current call; `inline_sources[r]` points to `inline[r]`.
    pub(super) inline: Box<[[u64; INLINE_WORDS]]>,
    pub(super) inline_sources: Box<[*const u8]>,
    /// Where the data of each rank lies in the current step.
    pub(super) sources: Vec<*const u8>,
    /// Where the input and the output of each rank lie in windows, in the current call.
    pub(super) places: Vec<(*mut u8, *mut u8)>,
    /// The scalars of a pre-multiplied sum.
    pub(super) scalars: Vec<f64>,
    /// Elements from each rank to each, in the current call: a row for every sender.
    pub(super) sizes: Vec<u64>,
    /// The row that is being normalised.
    pub(super) row: RowMemory,
    /// The block that is quantised.
    pub(super) quantised: BlockMemory,
    /// Asked by waits that last.
    pub(super) interrupt: Option<Interrupt>,
}

// SAFETY: the raw pointers point into the engine's own boxes, into the shared mapping that `control` keeps, or are
// rewritten before each use; none of them is tied to a thread.
unsafe impl Send for Engine {}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("rank", &self.rank).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Engine {
    pub(crate) fn new(config: EngineConfig) -> Self {
        let world_size = config.control.world_size();
        let recorder = Recorder::new(config.control.about().is_recording);
        let inline = vec![[0; INLINE_WORDS]; world_size].into_boxed_slice();
        let inline_sources = inline.iter().map(|data| data.as_ptr().cast()).collect();
        Self {
            control: config.control,
            rank: config.rank,
            world_size,
            policy: config.policy,
            budget: SpinBudget::new(&config.policy),
            polling: false,
            rules: config.rules,
            epoch: 0,
            chain: 0,
            step: 0,
            known: vec![Known::default(); world_size],
            credit: Known::default(),
            chains: [0; HISTORY as usize],
            headers: [[0; HEADER_WORDS]; CALL_SLOTS],
            current: [0; HEADER_WORDS],
            failed: None,
            flight: Flight::default(),
            messages: Messages::new(world_size),
            recorder,
            windows: Windows::default(),
            generation: config.generation,
            inline,
            inline_sources,
            sources: Vec::with_capacity(world_size),
            places: Vec::with_capacity(world_size),
            scalars: Vec::with_capacity(world_size),
            sizes: Vec::new(),
            row: RowMemory::default(),
            quantised: BlockMemory::default(),
            interrupt: None,
        }
    }

    /// Carries out one call. After a failure every call returns the first cause.
    #[inline]
    pub(crate) fn submit(&mut self, call: &Call<'_>) -> Result<()> {
        self.check()?;
        if !self.is_idle() || call.kind.is_message() {
            let left =
                if call.kind.is_message() { self.begin_message(call)? } else { Some(self.prepare(call)?) };
            let Some(prepared) = left else { return Ok(()) };
            let ticket = self.post(prepared)?;
            return self.drive(|engine| engine.is_done(ticket));
        }
        // In place: moving a plan takes longer than checking it.
        match self.plan(call) {
            Ok(ref plan) => self.execute(plan),
            Err(error) => Err(error),
        }
    }

    /// Checks a collective and chooses its algorithm.
    #[inline]
    pub(super) fn plan(&self, call: &Call<'_>) -> Result<Plan> {
        self.windows.settle(call.buffers())?;
        self.plan_on(call, None)
    }

    /// The same for a call on a GPU, by its number, and what finds windows there.
    #[inline]
    pub(crate) fn plan_on(&self, call: &Call<'_>, device: Option<(u32, FindWindow<'_>)>) -> Result<Plan> {
        let find_here = |id, ptr, bytes| self.windows.find(self.rank, id, ptr, bytes);
        let find = device.map_or(&find_here as FindWindow<'_>, |(_, find)| find);
        Plan::new(call, &self.situation(device.map(|(ordinal, _)| ordinal), find))
    }

    /// The same for a call on a buffer of each of some GPUs, by their numbers.
    #[cfg(feature = "cuda")]
    pub(crate) fn plan_each(&self, call: &Call<'_>, devices: &[u32]) -> Result<Plan> {
        let situation = self.situation(devices.first().copied(), &|_, _, _| None);
        Plan::new(call, &Situation { devices, ..situation })
    }

    /// What checks of a call need to know: on the host, or on a GPU, by its number.
    #[inline]
    pub(super) fn situation<'a>(&'a self, device: Option<u32>, find_window: FindWindow<'a>) -> Situation<'a> {
        Situation {
            rank: self.rank,
            world_size: self.world_size,
            rules: &self.rules,
            find_window,
            first_window: self.windows.first,
            generation: self.generation,
            device,
            devices: &[],
        }
    }

    /// A failure of a call that had begun is final.
    pub(super) fn remember<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.record_failure();
            self.abandon();
        }
        result
    }

    /// Ok, or the first cause why this communicator failed, or that this is a forked child. Costs two loads.
    #[inline]
    pub(crate) fn check(&mut self) -> Result<()> {
        self.control.check_process()?;
        if self.control.abort().raised().is_none() && self.failed.is_none() {
            return Ok(());
        }
        self.check_slowly()
    }

    /// Ok, or how this rank itself failed here before.
    #[inline]
    pub(super) fn check_own(&self) -> Result<()> {
        self.control.check_process()?;
        self.failed.clone().map_or(Ok(()), Err)
    }

    #[cold]
    fn check_slowly(&mut self) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.control.cause() {
            // Whoever left may have done all its part of what comes; the wait that misses it will say so.
            None | Some(Cause::Dropped { .. }) => Ok(()),
            Some(cause) => {
                let error = cause.into_error("an earlier call", (self.rank, self.world_size));
                self.remember(Err(error))
            }
        }
    }

    /// Carries out a collective, while none is in flight.
    #[inline]
    pub(crate) fn execute(&mut self, plan: &Plan) -> Result<()> {
        match self.advance(plan, &mut State::default()) {
            Ok(()) => Ok(()),
            Err(Halt::Failed(error)) => self.remember(Err(error)),
            Err(Halt::Pending(blocked)) => unreachable!("pending though it may block: {blocked:?}"),
        }
    }

    /// Takes a collective on from where it stopped, to its end or its next wait.
    #[inline]
    pub(super) fn advance(&mut self, plan: &Plan, at: &mut State) -> Step<()> {
        if !at.has_begun {
            at.has_begun = true;
            self.begin(&plan.header);
            self.record_collective(plan);
        }
        if self.epoch > self.credit.epoch + CALL_SLOTS as u64 {
            self.wait_for_epoch(self.epoch - CALL_SLOTS as u64)?;
        }
        // Nothing is moved out of the kind: what a few narrow writes made is slow to read whole.
        let steps = match &plan.header.kind {
            Kind::AllReduce { op } => self.all_reduce(plan, op, at),
            Kind::Broadcast { root } => self.broadcast(plan, *root as usize, at),
            Kind::AllGather | Kind::AllGatherV => self.all_gather(plan, at),
            Kind::Reduce { op, root } => self.reduce(plan, op, *root as usize, at),
            Kind::ReduceScatter { op } | Kind::ReduceScatterV { op } => self.reduce_scatter(plan, op, at),
            Kind::Gather { root } | Kind::GatherV { root } => self.gather(plan, *root as usize, at),
            Kind::Scatter { root } | Kind::ScatterV { root } => self.scatter(plan, *root as usize, at),
            Kind::AllToAll => self.all_to_all(plan, at),
            Kind::AllToAllV | Kind::AllToAllCounted => self.all_to_all_v(plan, at),
            Kind::AllReduceMulti { op } => self.all_reduce_multi(plan, op, at),
            Kind::AllReduceRmsNorm { .. } => self.all_reduce_rms_norm(plan, at),
            Kind::AllReduceQuantised => self.all_reduce_quantised(plan, at),
            Kind::BroadcastMulti { root, .. } => self.broadcast_multi(plan, *root as usize, at),
            _ => self.barrier(at),
        }?;
        self.finish(steps);
        self.record_done();
        Ok(())
    }

    /// Moves the epoch and the chain on.
    #[inline]
    fn begin(&mut self, header: &CallHeader) {
        self.epoch += 1;
        self.current = header.to_words();
        self.chain = CallHeader::chain(self.chain, CallHeader::fingerprint(&self.current));
        self.chains[(self.epoch % HISTORY) as usize] = self.chain as u32;
    }

    /// Publishes the slot of this call with `data`; what was staged before is announced with it.
    #[inline]
    pub(super) fn arrive(&mut self, data: &[u64]) {
        self.write_header();
        self.publish(data);
    }

    /// Writes the header of this call into its slot, unless an equal one stands there.
    #[inline]
    pub(super) fn write_header(&mut self) {
        let mine = self.control.rank(self.rank);
        let before = &mut self.headers[slot_of(self.epoch)];
        // Word by word: the current one was just written so, and wider reads would have to wait for that.
        if before.iter().zip(&self.current).any(|(before, now)| before != now) {
            *before = self.current;
            for (at, word) in self.current.iter().enumerate() {
                mine.slots.write(self.epoch, SLOT_HEADER + at, *word);
            }
        }
    }

    /// Publishes the slot of this call, in which its header stands, with `data`.
    #[inline]
    pub(super) fn publish(&self, data: &[u64]) {
        let mine = self.control.rank(self.rank);
        for (at, word) in data.iter().enumerate() {
            mine.slots.write(self.epoch, SLOT_DATA + at, *word);
        }
        mine.slots.write(self.epoch, SLOT_CHAIN, self.chain);
        mine.slots.publish(self.epoch);
        mine.sleepers.wake(mine.slots.word(self.epoch));
    }

    /// Waits for the slot of `peer` and compares chains: from here on its data of this call can be read.
    #[inline]
    pub(super) fn hear(&self, peer: usize) -> Step<()> {
        self.until(peer, On::Slot, self.epoch)?;
        if self.control.rank(peer).slots.read(self.epoch, SLOT_CHAIN) != self.chain {
            return Err(self.mismatch(peer, self.epoch).into());
        }
        Ok(())
    }

    /// After every peer was heard: all are done with the calls before this one.
    #[inline]
    pub(super) fn heard_all(&mut self) {
        self.credit = Known { epoch: self.epoch - 1, step: self.credit.step.max(self.step) };
    }

    /// All ranks but ours, starting behind us, so that not all read from the same one at once.
    #[inline]
    pub(super) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world_size) = (self.rank, self.world_size);
        (rank + 1..world_size).chain(0..rank)
    }

    /// Moves one of our own flags to `value` and wakes who sleeps on it.
    #[inline]
    pub(super) fn announce(&self, flag: impl for<'m> Fn(&RankWords<'m>) -> EpochFlag<'m>, value: u64) {
        let mine = self.control.rank(self.rank);
        let flag = flag(mine);
        flag.publish(value);
        mine.sleepers.wake(flag.word());
    }

    /// Takes credit for the staging chunk of `step` and returns its offset within staging.
    #[inline]
    pub(super) fn reserve(&mut self, step: u64) -> Step<usize> {
        if step > self.credit.step + CHUNKS as u64 {
            let needed = step - CHUNKS as u64;
            for peer in self.peers() {
                if self.known[peer].step < needed {
                    self.until(peer, On::Consumed, needed)?;
                    self.known[peer].step = self.control.rank(peer).consumed.current().min(step);
                }
            }
            self.credit.step = self.peers().map(|peer| self.known[peer].step).min().unwrap_or(u64::MAX / 2);
        }
        Ok(chunk(step))
    }

    /// Waits until every peer has completed call `needed`, and compares what all have done so far.
    #[cold]
    fn wait_for_epoch(&mut self, needed: u64) -> Step<()> {
        for peer in self.peers() {
            self.until(peer, On::Completed, needed)?;
            let epoch = self.compare(peer).map_err(|at| self.mismatch(peer, at))?;
            self.known[peer].epoch = epoch.min(self.epoch);
        }
        self.credit.epoch = self.peers().map(|peer| self.known[peer].epoch).min().unwrap_or(u64::MAX / 2);
        Ok(())
    }

    /// Tells the peers that this call, which took `steps` steps, is done.
    #[inline]
    fn finish(&mut self, steps: u64) {
        let mine = self.control.rank(self.rank);
        if steps > 0 {
            self.step += steps;
            mine.consumed.publish(self.step);
            mine.sleepers.wake(mine.consumed.word());
        }
        mine.completed.publish(self.epoch);
        mine.trail.publish(self.epoch << 32 | u64::from(self.chain as u32));
        mine.sleepers.wake(mine.trail.word());
    }

    fn barrier(&mut self, at: &mut State) -> Step<u64> {
        self.arrive_once(&[], at);
        for peer in self.peers() {
            self.hear(peer)?;
        }
        self.heard_all();
        Ok(0)
    }

    /// Publishes the slot of this call, the first time that its collective comes here.
    #[inline]
    pub(super) fn arrive_once(&mut self, data: &[u64], at: &mut State) {
        if at.phase == 0 {
            at.phase = 1;
            self.arrive(data);
        }
    }

    /// Stands for the meeting at the beginning, where ranks need none: threads of a process exist together. Calls are
    /// then numbered from 1 everywhere.
    pub(crate) fn have_met(&mut self) {
        self.epoch = 1;
        self.finish(0);
    }

    /// Whether the data of a one-shot call travels in the call slots.
    #[inline]
    pub(super) fn is_inline(&self, plan: &Plan) -> bool {
        select::is_inline(plan.header.kind, plan.bytes(), self.world_size)
    }

    /// A barrier of its own kind, with other patience: for the beginning and the end.
    pub(crate) fn meet(&mut self, header: CallHeader, patience: Option<Duration>) -> Result<()> {
        self.with_patience(patience, |engine| {
            engine.check()?;
            engine.drive(Self::is_idle)?;
            engine.execute(&Plan { header, ..Plan::bare(header.kind) })
        })
    }

    /// Does something with other patience.
    pub(crate) fn with_patience<R>(
        &mut self,
        patience: Option<Duration>,
        what: impl FnOnce(&mut Self) -> R,
    ) -> R {
        let usual = self.change_patience(patience);
        let result = what(self);
        self.policy.patience = usual;
        result
    }

    /// From now on waits last so long at most; the time before.
    pub(crate) const fn change_patience(&mut self, patience: Option<Duration>) -> Option<Duration> {
        std::mem::replace(&mut self.policy.patience, patience)
    }

    /// From now on waits that last ask this.
    pub(crate) fn interrupt_by(&mut self, interrupt: Interrupt) {
        self.interrupt = Some(interrupt);
    }

    /// How it waits.
    pub(crate) const fn policy(&self) -> WaitPolicy {
        self.policy
    }

    /// `all_reduce #812`; the meeting at the beginning is number 0.
    pub(super) fn call_name(&self) -> String {
        if self.epoch <= 1 {
            return "the start of the job".to_owned();
        }
        let name = CallHeader::from_words(&self.current).map_or("call", |header| header.kind.name());
        format!("{name} #{}", self.epoch - 1)
    }

    /// Fails the communicator for everybody, unless it has failed already; the error of the first cause.
    #[cold]
    pub(super) fn abort_with(&self, cause: Cause) -> Error {
        self.control.fail(&cause);
        self.cause_during(&self.call_name())
    }

    /// The error of the first cause, as who did `what` meets it.
    #[cold]
    pub(super) fn cause_during(&self, what: &str) -> Error {
        let unknown = || Cause::Aborted { rank: self.rank as u32, reason: "unknown".to_owned() };
        self.control.cause().unwrap_or_else(unknown).into_error(what, (self.rank, self.world_size))
    }
}

pub(super) fn slot_of(epoch: u64) -> usize {
    (epoch % CALL_SLOTS as u64) as usize
}

/// Offset of a step's chunk within staging.
#[inline]
pub(super) const fn chunk(step: u64) -> usize {
    (step % CHUNKS as u64) as usize * CHUNK_BYTES
}
