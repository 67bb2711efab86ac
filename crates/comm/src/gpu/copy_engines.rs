//! All-gathers and broadcasts by copy engines: the host puts the copies of each step, which `core::device::engine` tells, beside a chain
//! of small kernels in the user's stream (`kernels/engine.cuh`). No multiprocessor moves data.
//!
//! The copies of a lane go into a stream of the communicator's own, behind the kernel of their step, and the kernel of the lane's next
//! step goes behind them: events say so. Under capture the same becomes branches of the graph, without other streams: those would
//! belong to that capture until it ends, and no other call could have them. The last kernel comes behind all copies, so who has
//! passed the call in the user's stream has passed all of it.
//!
//! Per step the host gives one kernel, up to three copies, two records of events and two waits for them to the driver.

use unisono_core::call::Kind;
use unisono_core::device::engine::{MOST_LANES, Piece, Steps, slot_bytes};
use unisono_core::device::{ArenaLayout, Launch};
use unisono_cuda::capture::Front;
use unisono_cuda::{Device, Event, Function, Grid, Module, Result, Stream};

use super::Gpu;
use super::args::{Args, StepArgs};
use crate::cause::Cause;
use crate::collectives::Plan;
use crate::error::Error;

/// As many as `ENGINE_THREADS` of the kernels.
const GRID: Grid = Grid { blocks: 1, threads: 32, shared_bytes: 0, is_early: false };

/// What calls need that are not captured.
#[derive(Debug)]
pub(super) struct Engines {
    lanes: Vec<Lane>,
    /// Behind the latest kernel.
    passed: Event,
}

#[derive(Debug)]
struct Lane {
    stream: Stream,
    /// Behind the latest copies.
    copied: Event,
}

impl Engines {
    pub(super) fn new(device: &Device, lanes: usize) -> Result<Self> {
        let lane = |_| Ok(Lane { stream: Stream::new(device)?, copied: Event::new(device, false)? });
        Ok(Self { lanes: (0..lanes).map(lane).collect::<Result<_>>()?, passed: Event::new(device, false)? })
    }

    pub(super) fn lanes(&self) -> usize {
        self.lanes.len()
    }
}

/// The kernels of a call behind its first.
#[derive(Debug)]
pub(super) struct EngineFunctions {
    /// Before the copies of a step.
    step: Function,
    /// Behind all copies.
    end: Function,
}

impl EngineFunctions {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self { step: module.function("engine_step")?, end: module.function("engine_end")? })
    }
}

impl Gpu {
    /// Puts what follows the first kernel of a call by copy engines into `stream`.
    pub(super) fn launch_copies(
        &mut self,
        plan: &Plan,
        launch: Launch,
        stream: &Stream,
    ) -> crate::Result<()> {
        let (kind, ranks) = (plan.header.kind, self.rules.ranks);
        let (Some(engines), Some(functions)) = (&self.engines, &self.kernels.copies().engine) else {
            unreachable!("{kind:?} has no streams or kernels for {launch:?}")
        };
        let layout = ArenaLayout::new(ranks, self.rules.link);
        let call = EngineCall { kind, launch, args: &self.args, layout, functions, engines };
        // SAFETY: as in `launch`; if it ends in the middle, copies are waited for.
        unsafe { call.run(stream, ranks) }.map_err(|error| match stream.is_capturing() {
            // Nothing of it has begun.
            Ok(true) => self.refused(error),
            _ => self.broken_off(error),
        })
    }

    /// What the driver refused in the middle of a call, which can neither go on nor be taken back.
    #[cold]
    fn broken_off(&mut self, error: unisono_cuda::Error) -> Error {
        let rank = self.args.rank;
        let reason = format!("the driver refused a part of a call on its GPU: {error}");
        self.control.fail(&Cause::Aborted { rank, reason });
        // The user's stream does not wait for all copies, and kernels leave now.
        for lane in self.engines.iter().flat_map(|engines| &engines.lanes) {
            let _ = lane.stream.synchronize();
        }
        let error = Error::Cuda { rank: rank as usize, error };
        self.failed = Some(error.clone());
        error
    }
}

/// A call whose first kernel is in the stream.
struct EngineCall<'a> {
    kind: Kind,
    launch: Launch,
    args: &'a Args,
    layout: ArenaLayout,
    functions: &'a EngineFunctions,
    engines: &'a Engines,
}

impl EngineCall<'_> {
    /// Puts the rest of the call into `stream`.
    ///
    /// # Safety
    /// The buffers of the call are valid until the stream has passed it, and what `args` names as long as there is work of the
    /// communicator.
    unsafe fn run(&self, stream: &Stream, ranks: usize) -> Result<()> {
        let lanes = self.launch.blocks as usize;
        let chunk = self.launch.tile as usize * 16;
        let steps = Steps::new(self.kind, ranks, self.args.bytes as usize, (chunk, lanes));
        let mut branches = Branches::new(self.engines, stream)?;
        for t in 0..steps.count() {
            if t >= lanes {
                branches.join(t % lanes)?;
                self.pass(&self.functions.step, t + 1 - lanes, stream)?;
            }
            let step = steps.step(self.args.rank as usize, t);
            if step.pull.is_none() && step.stage.is_none() {
                continue;
            }
            branches.fork(t % lanes, |stream| {
                // SAFETY: as the caller promises; a step's pieces lie within the parts and the slots.
                unsafe {
                    step.pull.map_or(Ok(()), |piece| self.pull(piece, ranks, stream))?;
                    step.stage.map_or(Ok(()), |piece| self.stage(piece, stream))
                }
            })?;
        }
        (0..lanes).try_for_each(|lane| branches.join(lane))?;
        self.pass(&self.functions.end, 0, stream)
    }

    fn pass(&self, function: &Function, step: usize, stream: &Stream) -> Result<()> {
        let mut args = StepArgs { args: *self.args, step: step as u64 };
        // SAFETY: the kernels take `StepArgs`, or the `Args` that it begins with; what they name lives, as `run` demands.
        unsafe { function.launch(stream, GRID, (&raw mut args).cast()) }
    }

    /// # Safety
    /// As [`EngineCall::run`].
    unsafe fn pull(&self, piece: Piece, ranks: usize, stream: &Stream) -> Result<()> {
        let previous = (self.args.rank as usize + ranks - 1) % ranks;
        // SAFETY: as the caller promises.
        unsafe { stream.copy(self.output(piece), self.slot(previous, piece), piece.bytes) }
    }

    /// # Safety
    /// As [`EngineCall::run`].
    unsafe fn stage(&self, piece: Piece, stream: &Stream) -> Result<()> {
        let rank = self.args.rank as usize;
        let is_own = piece.owner == rank;
        let from = if is_own { self.args.sources[rank] + piece.at as u64 } else { self.output(piece) };
        // SAFETY: as the caller promises.
        unsafe {
            stream.copy(self.slot(rank, piece), from, piece.bytes)?;
            // Our own part, where it belongs.
            if is_own && self.args.is_same == 0 {
                stream.copy(self.output(piece), from, piece.bytes)?;
            }
        }
        Ok(())
    }

    /// Where a chunk belongs in our output.
    fn output(&self, piece: Piece) -> u64 {
        let part = if self.kind == Kind::AllGather { piece.owner as u64 * self.args.bytes } else { 0 };
        self.args.targets[self.args.rank as usize] + part + piece.at as u64
    }

    fn slot(&self, rank: usize, piece: Piece) -> u64 {
        let room = slot_bytes(&self.layout, self.launch.blocks as usize);
        self.args.arenas[rank] + (self.layout.scratch().offset + piece.slot * room) as u64
    }
}

/// Copies beside the kernels of a stream.
struct Branches<'a> {
    engines: &'a Engines,
    stream: &'a Stream,
    is_captured: bool,
    /// Lanes whose latest copies the stream does not wait for yet, and where they end in a graph.
    open: [Option<Front>; MOST_LANES],
}

impl<'a> Branches<'a> {
    fn new(engines: &'a Engines, stream: &'a Stream) -> Result<Self> {
        Ok(Self { engines, stream, is_captured: stream.is_capturing()?, open: Default::default() })
    }

    /// Copies of `lane`, behind what the stream has now.
    fn fork(&mut self, lane: usize, copies: impl FnOnce(&Stream) -> Result<()>) -> Result<()> {
        let stream = self.stream;
        self.open[lane] = Some(if self.is_captured {
            let kernel = stream.front()?;
            copies(stream)?;
            let end = stream.front()?;
            stream.set_front(&kernel)?;
            end
        } else {
            let Lane { stream: own, copied } = &self.engines.lanes[lane];
            self.engines.passed.record(stream)?;
            own.wait(&self.engines.passed)?;
            copies(own)?;
            copied.record(own)?;
            Front::default()
        });
        Ok(())
    }

    /// What comes next in the stream waits for the copies of `lane`.
    fn join(&mut self, lane: usize) -> Result<()> {
        match self.open[lane].take() {
            None => Ok(()),
            Some(front) if self.is_captured => self.stream.add_to_front(&front),
            Some(_) => self.stream.wait(&self.engines.lanes[lane].copied),
        }
    }
}
