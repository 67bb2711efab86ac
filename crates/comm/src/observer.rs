//! A view of a communicator for other threads: abort it, see what it does, ask why it chose what it chose.

use std::fmt::Write as _;
use std::sync::Arc;

use unisono_core::call::{CallHeader, Kind};
use unisono_core::layout::SLOT_HEADER;
use unisono_core::select::{self, Algorithm};
use unisono_core::topology::Topology;

use crate::cause::Cause;
use crate::control::Control;
use crate::error::Error;

/// A handle on a communicator that any thread may hold and use, at any time.
#[derive(Clone, Debug)]
pub struct Observer {
    control: Arc<Control>,
    topology: Arc<Topology>,
    rank: usize,
    forced: Option<Algorithm>,
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
    pub(crate) const fn new(
        control: Arc<Control>,
        topology: Arc<Topology>,
        rank: usize,
        forced: Option<Algorithm>,
    ) -> Self {
        Self { control, topology, rank, forced }
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
        let failure =
            self.control.cause().map(|cause| cause.into_error("the current call", self.control.member()));
        // The meeting at the beginning is counted by the words, but it is no call of the user's.
        State { completed: completed.saturating_sub(1), current, failure }
    }

    /// How this world is connected and which algorithm calls take, in a few lines; with the latest call and its own.
    pub fn explain(&self) -> String {
        let world_size = self.control.world_size();
        let mut text = String::new();
        for host in self.topology.hosts() {
            let _ = writeln!(text, "{}: ranks {:?}, connected by shared memory", host.name, host.ranks);
        }
        let _ = match self.forced {
            Some(algorithm) => {
                writeln!(text, "algorithm: {algorithm} where it can serve, because it was asked for")
            }
            None => writeln!(text, "algorithm: chosen by size, world size and windows"),
        };
        let epoch = self.control.rank(self.rank).completed.current();
        if let Some(header) = self.header(epoch)
            && let Some(dtype) = header.dtype
        {
            let bytes = (header.count as usize).saturating_mul(dtype.size());
            let algorithm = self.algorithm(header.kind, bytes, header.is_in_windows());
            let call = header.describe(epoch - 1, self.rank as u32);
            let _ =
                writeln!(text, "latest: {call}: {algorithm} ({bytes} bytes per rank, {world_size} ranks)");
        }
        text
    }

    /// The algorithm that a call takes: of `kind`, with `bytes` per rank, its buffers in windows or not. `inline` is
    /// one-shot with the data inside the call slot.
    pub fn algorithm(&self, kind: Kind, bytes: usize, in_windows: bool) -> String {
        let world_size = self.control.world_size();
        let question = select::Question { kind, bytes, world_size, in_windows, forced: self.forced };
        match select::algorithm(&question) {
            Algorithm::OneShot if select::is_inline(kind, bytes, world_size) => "inline".to_owned(),
            algorithm => algorithm.to_string(),
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
