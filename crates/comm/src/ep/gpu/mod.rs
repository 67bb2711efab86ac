//! A buffer on GPUs: memory that all ranks' devices reach, and calls as kernels in streams.
//!
//! Everything that kernels need is made at the exchange. A call is then checked, its output taken from the pool, and its kernels are launched;
//! nobody waits on the host but a dispatch that has to know how many rows come. What kernels find they write into a page of host memory, where a
//! thread, the next call or `check` reads it.
//!
//! Kernels of one buffer follow each other: in one stream by themselves, on several by an event behind each call. Within a graph its own
//! dependencies order them.

use std::sync::Arc;
use std::time::Duration;

use unisono_core::device::Link;
use unisono_core::ep::{ArenaShape, DeviceLayout, Placement};
use unisono_core::layout::Field;
use unisono_core::settings::format_size;
use unisono_cuda::{Event, Function, Grid, Stream};
use unisono_sync::{SpinBudget, WaitPolicy, Word};

use super::words::{CallWords, ToldWords};
use crate::communicator::Communicator;
use crate::control::words_in;
use crate::error::{Error, Result};
use crate::gpu::budget::Budget;
use crate::gpu::one_sided::nanoseconds;
use crate::operations::Operations;
use crate::symmetric::Symmetric;
use args::{BufferArgs, MaskArgs};
use core::Core;
use low_latency::LowLatency;
use pool::{For, Slab};
use report::{COMPLAINT, MASKED, OVERFLOW, REPORT, Report};
use watch::Watch;

mod args;
mod combine;
pub(super) mod core;
pub mod kernels;
mod layout;
mod low_latency;
mod making;
mod pool;
mod report;
mod throughput;
mod watch;

pub(super) use combine::Results;
pub(super) use layout::DeviceRouting;
pub(super) use low_latency::{DeviceOrigins, Inputs, Phases, SentOnGpu};
pub(super) use pool::Slab as Memory;
pub(super) use throughput::{DeviceRoutes, Outgoing, OutgoingScales, Wanted};

/// How much longer than later ones the first call waits: ranks load and compile at first.
const FIRST_CALL: u32 = 10;

/// One rank's side of a buffer on its GPU.
#[derive(Debug)]
pub(super) struct OnGpu {
    core: Arc<Core>,
    /// Until the buffer is closed.
    memory: Option<Symmetric<u64>>,
    layout: DeviceLayout,
    args: BufferArgs,
    rank: usize,
    world_size: usize,
    /// Where peers' and our counts of experts lie in the tables.
    tables: Tables,
    /// Behind the latest call outside of graphs.
    order: Event,
    latest: usize,
    /// The latest capture whose graph keeps what kernels touch.
    kept_by: Option<u64>,
    /// The latest exchange of counts that the host waits for.
    ticket: u64,
    /// Where the settings ask for them.
    low_latency: Option<LowLatency>,
    /// Blocks that may wait at once, and as many as calls take that ask for nothing else.
    blocks: u32,
    multiprocessors: u32,
    masking: bool,
    deadline: Duration,
    pub(super) has_met: bool,
    /// Whether the latest call has told its peers of it.
    has_sent: bool,
    policy: WaitPolicy,
    budget: SpinBudget,
    /// What calls took: dispatches straight into the pool and through staging, combines in place and of copies.
    taken: Taken,
    failed: Option<Error>,
    /// Whether no kernel of any rank is at work on it any more.
    is_quiet: bool,
    _blocks: Budget,
    _watch: Watch,
}

/// How calls went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Taken {
    pub(super) direct_dispatches: u64,
    pub(super) staged_dispatches: u64,
    pub(super) direct_combines: u64,
    pub(super) copied_combines: u64,
}

/// Where lists lie among the tables.
#[derive(Clone, Copy, Debug)]
struct Tables {
    experts: u64,
    order: u64,
    begins: u64,
    local_experts: usize,
    number: usize,
}

/// The settings of a buffer that matter here.
pub(super) struct Shape<'a> {
    pub(super) arena: ArenaShape,
    pub(super) layout: DeviceLayout,
    pub(super) placement: &'a Placement,
    pub(super) masking: bool,
    pub(super) deadline: Duration,
    /// Blocks that a call takes.
    pub(super) multiprocessors: u32,
    /// Ranks that share our device, this one too.
    pub(super) crowd: usize,
}

/// Why buffers cannot work on the GPU of this communicator, if they cannot.
pub(super) fn check_link(communicator: &Communicator) -> Result<()> {
    if communicator.gpu_link() == Some(Link::Device) {
        return Ok(());
    }
    let reason = "an ep::Buffer needs GPUs that reach each other's memory, and these do not".to_owned();
    Err(Error::Device { rank: communicator.rank(), reason })
}

impl OnGpu {
    /// Ends it on all ranks. Collective. Outputs that are still held stay valid, and keep the memory.
    pub(super) fn close(mut self, communicator: &Communicator) -> Result<()> {
        let Some(memory) = self.memory.take() else { return Ok(()) };
        // To free memory may wait for all kernels of this process, and so for one that waits for a rank that frees. So all are quiet before,
        // and none goes on, which the end of the memory sees to, before all are done.
        let synchronized = self.core.device.synchronize().map_err(|error| self.refused(error));
        self.is_quiet = synchronized.is_ok() && communicator.barrier().is_ok();
        unisono_cuda::capture::drop_released();
        drop(self);
        memory.close(communicator)
    }

    pub(super) fn ordinal(&self) -> u32 {
        self.core.device.ordinal()
    }

    /// Ranks that kernels left out, by bits; ours too, if our kernels found that others left it out.
    pub(super) fn masked(&self) -> u64 {
        let told = words_in(&self.core.page_memory, MASKED);
        let is_given_up = Report::read(self.words(REPORT)) == Some(Report::GivenUp);
        (0..self.world_size)
            .filter(|rank| told[*rank].load_relaxed() != 0)
            .fold(u64::from(is_given_up) << self.rank, |bits, rank| bits | 1 << rank)
    }

    /// Leaves `rank` out from the next round in which it has not taken part: on all ranks, when this returns. It waits for no call.
    pub(super) fn mask(&self, rank: usize) -> Result<()> {
        let args = MaskArgs { buffer: self.args, rank_to_mask: rank as u64 };
        let grid = Grid { blocks: 1, threads: 32, shared_bytes: 0, is_early: false };
        let stream = Stream::new(&self.core.device).map_err(|error| self.refused(error))?;
        // SAFETY: the kernel takes `MaskArgs`, and what it reaches of peers stays as long as `Core`, which is here until it is through.
        unsafe { self.launch(&self.core.kernels.mask, &stream, grid, args) }?;
        stream.synchronize().map_err(|error| self.refused(error))
    }

    /// How calls went so far.
    pub(super) fn explain(&self) -> String {
        let (free, outside) = self.core.pool.standing();
        let Taken { direct_dispatches, staged_dispatches, direct_combines, copied_combines } = self.taken;
        let mut text = format!(
            "through memory of GPUs, {} of {} multiprocessors in each call; {} of {} of the pool are free; {direct_dispatches} dispatches \
             straight to their place",
            self.workers(None) + 1,
            self.core.device.facts().multiprocessors,
            format_size(free as u64),
            format_size(self.layout.pool.bytes as u64),
        );
        if staged_dispatches > 0 {
            text += &format!(", {staged_dispatches} through staging, because the pool was full");
        }
        text += &format!("; {direct_combines} combines of results in place");
        if copied_combines > 0 {
            text += &format!(
                ", {copied_combines} of copies, because they lay outside of the pool or had several rows for a token"
            );
        }
        if outside > 0 {
            text += &format!("; {outside} outputs in memory beside the pool, because that was full");
        }
        text
    }

    /// Ok, or why no call can be made, or what kernels found since.
    pub(super) fn check(&mut self, during: &str) -> Result<()> {
        let control = &self.core.control;
        control.check_process()?;
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if let Some(error) = self.memory.as_ref().and_then(|memory| control.outdated(memory.id())) {
            return Err(error);
        }
        if let Some(report) = Report::read(self.words(REPORT)) {
            if let Some(cause) = report.cause(control) {
                control.fail(&cause);
            }
            let error = report.into_error(control, during);
            self.failed = Some(error.clone());
            return Err(error);
        }
        match control.cause() {
            None | Some(crate::cause::Cause::Dropped { .. }) => Ok(()),
            Some(crate::cause::Cause::Died { rank, .. }) if self.masking && rank as usize != self.rank => {
                Ok(())
            }
            Some(cause) => Err(cause.into_error(during, control.member())),
        }
    }

    /// What kernels found of earlier calls that is no failure: once.
    pub(super) fn take_complaints(&self, top_k: usize) -> Result<()> {
        let take = |field| {
            let word = &self.words(field)[0];
            let value = word.load_acquire();
            word.store_relaxed(0);
            value
        };
        let (overflow, complaint) = (take(OVERFLOW), take(COMPLAINT));
        if overflow != 0 {
            return Err(Error::Argument {
                call: "dispatch",
                rank: self.rank,
                what: "worst_tokens",
                expected: format!("at least {overflow}, as many as came"),
                got: "fewer".to_owned(),
            });
        }
        report::complaint(complaint, (self.rank, top_k, self.tables.number))
    }

    fn words(&self, field: Field) -> &[impl Word<u64>] {
        words_in(&self.core.page_memory, field)
    }

    fn page_at(&self, field: Field) -> u64 {
        self.core.page.address() + field.offset as u64
    }

    /// Brings a call into the order of calls; whether it is captured.
    fn begin(&mut self, call: &'static str, stream: &Stream) -> Result<bool> {
        self.has_sent = false;
        if stream.device() != &self.core.device {
            return Err(Error::Argument {
                call,
                rank: self.rank,
                what: "stream",
                expected: format!("one of cuda:{}", self.ordinal()),
                got: format!("one of cuda:{}", stream.device().ordinal()),
            });
        }
        if stream.is_capturing().map_err(|error| self.refused(error))? {
            let Some(capture) = stream.capture().map_err(|error| self.refused(error))? else {
                return Ok(true);
            };
            if self.kept_by != Some(capture.id()) {
                capture.keep(self.core.clone()).map_err(|error| self.refused(error))?;
                self.kept_by = Some(capture.id());
            }
            return Ok(true);
        }
        let this = stream.raw() as usize | 1;
        if self.latest != 0 && self.latest != this {
            stream.wait(&self.order).map_err(|error| self.refused(error))?;
        }
        self.latest = this;
        Ok(false)
    }

    /// What follows the kernels of a call: calls on other streams come behind it.
    fn conclude(&mut self, (stream, is_captured): (&Stream, bool)) -> Result<()> {
        if !is_captured {
            self.has_met = true;
            self.order.record(stream).map_err(|error| self.refused(error))?;
        }
        Ok(())
    }

    /// Whether the latest call counts: peers know of it, or will.
    pub(super) const fn has_sent(&self) -> bool {
        self.has_sent
    }

    /// The arguments of a round of `words`.
    fn round(&self, words: &CallWords, stage: u64, told: &ToldWords) -> BufferArgs {
        let limit = if self.has_met { self.deadline } else { self.deadline.saturating_mul(FIRST_CALL) };
        let limit_ns = nanoseconds(Some(limit));
        let mut args = self.args;
        args.call.header = words.to_header(stage, told);
        (args.call.patience_ns, args.deadline_ns) = if self.masking { (0, limit_ns) } else { (limit_ns, 0) };
        args
    }

    /// Memory for a call, which its graph keeps if it is captured.
    fn take(
        &self,
        bytes: usize,
        (stream, is_captured): (&Stream, bool),
        who: For,
    ) -> Result<Option<Arc<Slab>>> {
        let slab = Slab::take(&self.core, bytes, (stream, is_captured), who);
        let slab = slab.map_err(|error| self.refused(error))?;
        if let Some(slab) = &slab {
            self.keep(slab, (stream, is_captured))?;
        }
        Ok(slab)
    }

    /// A graph keeps what its calls touch.
    fn keep(&self, slab: &Arc<Slab>, (stream, is_captured): (&Stream, bool)) -> Result<()> {
        if is_captured && let Some(capture) = stream.capture().map_err(|error| self.refused(error))? {
            capture.keep(slab.clone()).map_err(|error| self.refused(error))?;
        }
        Ok(())
    }

    /// Memory that only our device needs.
    fn take_own(&self, bytes: usize, stream: (&Stream, bool)) -> Result<Arc<Slab>> {
        let Some(slab) = self.take(bytes, stream, For::Us)? else {
            unreachable!("memory of our own is no pool")
        };
        Ok(slab)
    }

    /// Puts a kernel with `args`, which it takes by value, into `stream`.
    ///
    /// # Safety
    /// `function` takes `T`, and all that `args` names is valid until the stream has passed it.
    unsafe fn launch<T>(&self, function: &Function, stream: &Stream, grid: Grid, mut args: T) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { function.launch(stream, grid, (&raw mut args).cast()) }.map_err(|error| self.refused(error))
    }

    #[cold]
    fn refused(&self, error: unisono_cuda::Error) -> Error {
        if let Some(cause) = crate::gpu::lost_context(&error, &self.core.control) {
            self.core.control.fail(&cause);
        }
        Error::Cuda { rank: self.rank, error }
    }
}

impl Drop for OnGpu {
    fn drop(&mut self) {
        if self.core.control.check_process().is_err() {
            std::mem::forget((self.memory.take(), self.core.clone()));
            return;
        }
        if self.is_quiet {
            return;
        }
        // Kernels may still be at work: they end in time, and nobody waits for them here. If no thread can be had, the memory stays.
        let kept = std::mem::ManuallyDrop::new(self.core.clone());
        let reap = move || {
            let _ = kept.device.synchronize();
            drop(std::mem::ManuallyDrop::into_inner(kept));
        };
        if let Err(error) = std::thread::Builder::new().name("unisono-reaper".to_owned()).spawn(reap) {
            tracing::warn!("memory of an ep::Buffer is not given back: {error}");
        }
    }
}

/// Fields of a slab, one behind the other, each on a line.
#[derive(Default)]
struct Fields {
    end: usize,
}

impl Fields {
    /// Where the next `bytes` go.
    const fn add(&mut self, bytes: usize) -> usize {
        let at = self.end;
        self.end = (at + bytes).next_multiple_of(unisono_core::ep::DEVICE_LINE);
        at
    }
}
