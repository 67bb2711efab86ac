//! A view of a communicator for other threads: abort it, see what it does, ask why it chose what it chose.

use std::sync::Arc;

use unisono_core::call::{CallHeader, Kind};
use unisono_core::layout::SLOT_HEADER;
use unisono_core::topology::Topology;

use crate::cause::Cause;
use crate::control::Control;
use crate::error::Error;
use crate::explanation::{Choice, Explanation, NOT_ALL, OnGpus};
use crate::tuning::Selection;

/// A handle on a communicator that any thread may hold and use, at any time.
#[derive(Clone, Debug)]
pub struct Observer {
    control: Arc<Control>,
    topology: Arc<Topology>,
    rank: usize,
    selection: Arc<Selection>,
    gpus: Option<OnGpus>,
}

/// What a communicator is doing, as far as can be seen from outside.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct State {
    /// Calls that this rank has completed.
    pub completed: u64,
    /// The call that this rank is in, as `all_reduce #812 on rank 2 (bf16, 4096, sum)`; `None` between calls.
    pub current: Option<String>,
    /// The first cause, if the communicator failed.
    pub failure: Option<Error>,
}

impl Observer {
    pub(crate) fn new(
        control: Arc<Control>,
        topology: Arc<Topology>,
        (rank, gpus): (usize, Option<OnGpus>),
        selection: Arc<Selection>,
    ) -> Self {
        Self { control, topology, rank, selection, gpus }
    }

    /// Fails the communicator on all ranks: whoever waits returns [`Error::Aborted`] with `reason`. The first cause
    /// stands; aborting again does nothing.
    pub fn abort(&self, reason: &str) {
        self.control.fail(&Cause::Aborted { rank: self.rank as u32, reason: reason.to_owned() });
    }

    /// What this rank's communicator is doing now.
    pub fn state(&self) -> State {
        let words = self.control.rank(self.rank);
        let completed = words.completed.current();
        let next = completed.wrapping_add(1);
        let current = (words.slots.standing(next) == next).then(|| self.describe(next)).flatten();
        #[cfg(feature = "cuda")]
        let current = current.or_else(|| self.waits_on_gpu());
        let failure =
            self.control.cause().map(|cause| cause.into_error("the current call", self.control.member()));
        // The meeting at the beginning is counted by the words, but it is no call of the user's.
        State { completed: completed.saturating_sub(1), current, failure }
    }

    /// How this world is connected, how it chooses algorithms, and what the latest collective of this rank took and why.
    /// Print it, or look at its fields.
    pub fn explain(&self) -> Explanation {
        let epoch = self.control.rank(self.rank).completed.current();
        let latest = self.header(epoch).and_then(|header| {
            let bytes = (header.count as usize).saturating_mul(header.dtype?.size());
            let windows = match (header.source_window, header.target_window) {
                _ if header.is_in_windows() => Ok(()),
                (0, 0) => Err(NOT_ALL),
                (0, _) => Err("the input lies in no window"),
                (_, 0) => Err("the output lies in no window"),
                _ => Err("input and output lie in the same window"),
            };
            let choice =
                Choice::new(&self.selection, self.control.world_size(), (header.kind, bytes), windows);
            Some((header.describe(epoch - 1, self.rank as u32), choice))
        });
        let rules = self.selection.rules;
        Explanation {
            hosts: self.topology.hosts().to_vec(),
            forced: rules.forced.map(|algorithm| (algorithm, self.selection.asked_by)),
            thresholds: rules.thresholds,
            origin: self.selection.origin.clone(),
            gpus: self.gpus.clone(),
            latest,
        }
    }

    /// What a call takes and why: of `kind`, with `bytes` per rank, all its buffers in windows or not.
    pub fn choice(&self, kind: Kind, bytes: usize, in_windows: bool) -> Choice {
        let windows = if in_windows { Ok(()) } else { Err(NOT_ALL) };
        Choice::new(&self.selection, self.control.world_size(), (kind, bytes), windows)
    }

    /// The call in which our GPU waits, if it has done so for half a second.
    #[cfg(feature = "cuda")]
    fn waits_on_gpu(&self) -> Option<String> {
        let wait = crate::gpu::args::waiting(self.control.gpu())?;
        let peer = wait.peer;
        let world_size = self.control.world_size();
        let name = if peer < world_size { self.control.name(peer) } else { "any rank" };
        let what = wait.work.describe(peer, world_size);
        Some(format!("{what} on the GPU of rank {}, waiting for {name}", self.rank))
    }

    /// The last calls on the GPU of `rank`, oldest first, replays of graphs among them: which one its kernels are in, since when,
    /// and whether all ranks have come to it. Works while they hang; takes some 0.1 s.
    ///
    /// Times are before now, by the device's clock, as it was compared with ours when the communicator was made: what the two drift
    /// apart is an error of them all, but not of how long a call took.
    ///
    /// ```no_run
    /// # let observer = unisono::Communicator::local(&[0, 1])?.remove(0).observer();
    /// if let Some(call) = observer.gpu_calls(1)?.last().filter(|call| call.is_open()) {
    ///     println!("rank 1 has been in {call} for {:?}", call.begun);
    /// }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Device`] if there is no such rank, it works on no GPU, or did not answer within a second: its process is stopped or
    /// gone. [`Error::Forked`] in a forked child.
    #[cfg(feature = "cuda")]
    pub fn gpu_calls(&self, rank: usize) -> crate::Result<Vec<crate::recorder::GpuCall>> {
        use crate::recorder::{Reading, ask, clock};
        self.control.check_process()?;
        let none = |reason: &str| Error::Device { rank, reason: reason.to_owned() };
        if rank >= self.control.world_size() {
            return Err(none("there is no such rank"));
        }
        let has_answered = ask::ask(&[self.control.gpu_page(rank)]) == [true];
        match self.control.gpu_view(rank, &clock()) {
            None => Err(none("this communicator was made without one (Builder::device)")),
            Some(view) if has_answered || view.reading == Reading::Last => Ok(view.calls),
            Some(_) => Err(none("it did not tell its last calls within a second")),
        }
    }

    fn describe(&self, epoch: u64) -> Option<String> {
        Some(self.header(epoch)?.describe(epoch - 1, self.rank as u32))
    }

    /// The header that our slot of `epoch` holds, if it still does.
    fn header(&self, epoch: u64) -> Option<CallHeader> {
        let slots = self.control.rank(self.rank).slots;
        if epoch == 0 || slots.standing(epoch) != epoch {
            return None;
        }
        let header = CallHeader::from_words(&std::array::from_fn(|at| slots.read(epoch, SLOT_HEADER + at)))?;
        (header.kind != Kind::Destroy).then_some(header)
    }
}
