//! One rank of a benchmark: runs every size of every operation, verifies every element, times batches of calls.
//!
//! A batch is timed from after a barrier to the last call's return. What counts of each batch is the slowest rank's
//! time; percentiles are taken over batches. Batches are 1,000 calls below 4 KiB, where a clock reading would weigh.

use std::time::{Duration, Instant};

use unisono::{
    Call, Communicator, DType, Element, Kind, Memory, Operations, Place, RawBuffer, ReduceOp, Window,
};

use super::Operation;
use super::pattern::Patterns;
use super::record::{Line, Measured};
use super::workload::Workload;

type Result<T, E = unisono::Error> = std::result::Result<T, E>;

/// Runs the workload as the rank that the environment says; rank 0 writes lines to standard output.
pub(super) fn run(workload: &Workload) -> Result<(), String> {
    let communicator = Communicator::from_env().map_err(|error| error.to_string())?;
    let rank = Rank {
        workload,
        patterns: Patterns::new(workload.dtype, communicator.world_size(), 11),
        communicator,
    };
    rank.measure_all().map_err(|error| error.to_string())?;
    rank.communicator.destroy().map_err(|error| error.to_string())
}

struct Rank<'a> {
    workload: &'a Workload,
    patterns: Patterns,
    communicator: Communicator,
}

/// The memory of one size: what goes in, what comes out. In place they are one.
enum Buffers {
    Plain { source: Vec<u8>, target: Vec<u8> },
    Windows { source: Window<u8>, target: Window<u8> },
}

impl Rank<'_> {
    fn measure_all(&self) -> Result<()> {
        let sizes = |operation: &Operation| {
            if *operation == Operation::Barrier { 1 } else { self.workload.sizes.len() }
        };
        let all = self.workload.operations.iter().map(sizes).sum::<usize>();
        Line::Ready { sizes: all as u64 }.tell(self.communicator.rank());
        for operation in &self.workload.operations {
            for bytes in self.workload.sizes.iter().take(sizes(operation)) {
                let bytes = if *operation == Operation::Barrier { 0 } else { *bytes };
                let measured = self.measure(*operation, bytes)?;
                Line::Size(measured).tell(self.communicator.rank());
            }
        }
        Ok(())
    }

    fn measure(&self, operation: Operation, bytes: usize) -> Result<Measured> {
        let count = bytes / self.workload.dtype.size();
        let mut buffers = self.buffers(operation, count)?;
        let mut wrong = self.verify(operation, count, &mut buffers, true)?;
        let batch = if self.workload.synchronised || bytes >= 4096 { 1 } else { 1000 };
        let rounds = self.rounds(operation, count, &mut buffers, batch)?;
        let mut times = vec![0f64; rounds];
        for time in &mut times {
            self.communicator.barrier()?;
            let start = Instant::now();
            for _ in 0..batch {
                self.call(operation, count, &mut buffers)?;
            }
            *time = start.elapsed().as_secs_f64() * 1e6 / batch as f64;
        }
        wrong += self.verify(operation, count, &mut buffers, false)?;
        self.communicator.all_reduce(&mut times, ReduceOp::Max)?;
        times.sort_by(f64::total_cmp);
        let mut total_wrong = [wrong];
        self.communicator.all_reduce(&mut total_wrong, ReduceOp::Sum)?;
        if let Buffers::Windows { source, target } = buffers {
            source.close(&self.communicator)?;
            target.close(&self.communicator)?;
        }
        let p50_us = times[rounds / 2];
        let (algbw, busbw) = operation.bandwidth(self.communicator.world_size(), bytes, p50_us);
        Ok(Measured {
            operation: operation.name().to_owned(),
            bytes: bytes as u64,
            algorithm: self.algorithm(operation, count),
            calls: (rounds * batch) as u64,
            batch: batch as u64,
            p50_us,
            p99_us: times[(rounds * 99 / 100).min(rounds - 1)],
            min_us: times[0],
            algbw,
            busbw,
            wrong: total_wrong[0],
        })
    }

    /// How many batches fit into the time per size: measured on a few, agreed by all ranks. Warms up, too.
    fn rounds(
        &self,
        operation: Operation,
        count: usize,
        buffers: &mut Buffers,
        batch: usize,
    ) -> Result<usize> {
        let warm_up = if count * self.workload.dtype.size() >= 1 << 20 { 3 } else { 20 };
        let mut slowest = [Duration::ZERO.as_secs_f64()];
        for _ in 0..warm_up {
            self.communicator.barrier()?;
            let start = Instant::now();
            for _ in 0..batch {
                self.call(operation, count, buffers)?;
            }
            slowest[0] = start.elapsed().as_secs_f64();
        }
        self.communicator.all_reduce(&mut slowest, ReduceOp::Max)?;
        let rounds = self.workload.time_per_size.as_secs_f64() / slowest[0].max(1e-9);
        Ok((rounds as usize).clamp(self.workload.least_batches, 20_000))
    }

    fn buffers(&self, operation: Operation, count: usize) -> Result<Buffers> {
        let size = self.workload.dtype.size();
        let (input, output) = operation.parts(self.communicator.world_size());
        let output = if self.workload.in_place { input.max(output) } else { output };
        let (input, output) = (count * size * input, count * size * output);
        let mut buffers = if self.workload.windows {
            let source = self.communicator.window(input, Memory::Host)?;
            Buffers::Windows { source, target: self.communicator.window(output, Memory::Host)? }
        } else {
            Buffers::Plain { source: vec![0; input], target: vec![0; output] }
        };
        self.patterns.fill(self.communicator.rank(), buffers.source()?);
        Ok(buffers)
    }

    /// Runs (or only looks at) the result and counts the elements of ours that are wrong.
    fn verify(&self, operation: Operation, count: usize, buffers: &mut Buffers, fresh: bool) -> Result<u64> {
        if operation == Operation::Barrier {
            return self.communicator.barrier().map(|()| 0);
        }
        if fresh || self.workload.in_place {
            buffers.target()?.fill(0xa5);
            if self.workload.in_place {
                let rank = self.communicator.rank();
                let part = count * self.workload.dtype.size();
                let start = if operation == Operation::AllGather { rank * part } else { 0 };
                let (input, _) = operation.parts(self.communicator.world_size());
                self.patterns.fill(rank, &mut buffers.target()?[start..start + input * part]);
            }
            self.call(operation, count, buffers)?;
        }
        let rank = self.communicator.rank();
        let part = (count * self.workload.dtype.size()).max(1);
        let target = buffers.target()?;
        let of_each = |first: usize| {
            let parts = target.chunks(part).enumerate();
            parts.map(|(rank, got)| self.patterns.wrong_from(self.patterns.input(rank), first, got)).sum()
        };
        match operation {
            Operation::Reduce | Operation::Gather if rank != 0 => Ok(0),
            Operation::AllReduce | Operation::Reduce => Ok(self
                .patterns
                .wrong(&self.patterns.reduced(self.workload.dtype, self.workload.op)?, target)),
            Operation::AllReduceQuantised => {
                let dtype = self.workload.dtype;
                let whole = self.patterns.quantised(dtype, 0, count)?;
                self.patterns.wrong_quantised(dtype, (&whole, 0), target)
            }
            Operation::ReduceScatter => {
                let expected = self.patterns.reduced(self.workload.dtype, self.workload.op)?;
                let mine = if self.workload.in_place {
                    &target[rank * part..(rank + 1) * part]
                } else {
                    &target[..]
                };
                Ok(self.patterns.wrong_from(&expected, rank * count, mine))
            }
            Operation::Scatter => Ok(self.patterns.wrong_from(self.patterns.input(0), rank * count, target)),
            Operation::Broadcast => Ok(self.patterns.wrong(self.patterns.input(0), target)),
            Operation::AllGather | Operation::Gather => Ok(of_each(0)),
            Operation::AllToAll => Ok(of_each(rank * count)),
            Operation::SendRecv => match self.partner() {
                Some(partner) => {
                    Ok(self.patterns.wrong(self.patterns.input(rank.min(partner)), buffers.target()?))
                }
                None => Ok(0),
            },
            // Refused on the host before, or measured elsewhere.
            Operation::Barrier | Operation::AllReduceRmsNorm | Operation::Moe => Ok(0),
        }
    }

    /// The other rank of our pair; the last of an odd number of ranks has none.
    fn partner(&self) -> Option<usize> {
        let partner = self.communicator.rank() ^ 1;
        (partner < self.communicator.world_size()).then_some(partner)
    }

    /// A round trip: the even rank of a pair sends its input, the odd one sends back what it got.
    fn round_trip(&self, (source, target): (RawBuffer, RawBuffer)) -> Result<()> {
        let Some(partner) = self.partner() else { return Ok(()) };
        let partner = partner as u32;
        // SAFETY: the caller borrows both buffers over this call; host calls are complete on return.
        let submit = |kind, buffer| self.communicator.submit(unsafe { Call::from_raw(kind, &[buffer], &[]) });
        let (send, recv) = (Kind::Send { to: partner, tag: 0 }, Kind::Recv { from: partner, tag: 0 });
        if self.communicator.rank().is_multiple_of(2) {
            submit(send, source)?;
            submit(recv, target)
        } else {
            submit(recv, target)?;
            submit(send, target)
        }
    }

    fn call(&self, operation: Operation, count: usize, buffers: &mut Buffers) -> Result<()> {
        if operation == Operation::SendRecv {
            return self.round_trip(buffers.raw(self.workload.dtype, count));
        }
        let Some(kind) = operation.kind(self.workload.op) else { return self.communicator.barrier() };
        let (input, _) = operation.parts(self.communicator.world_size());
        let (source, target) = buffers.raw(self.workload.dtype, count * input);
        let both = [source, target];
        let used = if self.workload.in_place { &both[1..] } else { &both[..] };
        // SAFETY: both buffers belong to `buffers`, which is borrowed mutably over this call, and are as long as `count`
        // elements (times the world size for the result of an all-gather); the host call is complete on return.
        let call = unsafe { Call::from_raw(kind, used, &[]) };
        self.communicator.submit(call)
    }

    fn algorithm(&self, operation: Operation, count: usize) -> String {
        let Some(kind) = operation.kind(self.workload.op) else {
            return if operation == Operation::SendRecv { "channel" } else { "flags" }.to_owned();
        };
        let bytes = count * self.workload.dtype.size();
        // An all-to-all in place has one window, and reads nothing there.
        let in_windows = self.workload.windows && !(self.workload.in_place && kind == Kind::AllToAll);
        self.communicator.observer().choice(kind, bytes, in_windows).name().to_owned()
    }
}

impl Buffers {
    fn source(&mut self) -> Result<&mut [u8]> {
        match self {
            Self::Plain { source, .. } => Ok(source),
            Self::Windows { source, .. } => source.lend(),
        }
    }

    fn target(&mut self) -> Result<&mut [u8]> {
        match self {
            Self::Plain { target, .. } => Ok(target),
            Self::Windows { target, .. } => target.lend(),
        }
    }

    /// Both as buffers of `dtype`: `count` elements in, as many as there is room for out.
    fn raw(&mut self, dtype: DType, count: usize) -> (RawBuffer, RawBuffer) {
        let view = |raw: RawBuffer, count: usize| RawBuffer { dtype, count, ..raw };
        let (source, target) = match self {
            Self::Plain { source, target } => (plain(source), plain(target)),
            Self::Windows { source, target } => {
                let (inputs, outputs) = (source.len(), target.len());
                (source.range_mut(0..inputs).raw(), target.range_mut(0..outputs).raw())
            }
        };
        let outputs = target.count / dtype.size();
        (view(source, count), view(target, outputs))
    }
}

fn plain(bytes: &mut [u8]) -> RawBuffer {
    let ptr = bytes.as_mut_ptr().expose_provenance() as u64;
    RawBuffer { ptr, count: bytes.len(), dtype: u8::DTYPE, place: Place::Host }
}
