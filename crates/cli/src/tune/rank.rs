//! One rank of `unisono tune`: three communicators over the same ranks, each with one algorithm, timed in turns.
//!
//! Turns of a few milliseconds go round the algorithms until the time is used, so that a change of the machine's mood
//! hits all of them alike. A turn's time is that of the slowest rank; what counts is the lower quartile over turns. Direct
//! needs windows; the staged ones are timed on plain memory, where they do the same work.

use std::io::Write as _;
use std::time::{Duration, Instant};

use unisono::settings::AlgorithmChoice;
use unisono::{Builder, Communicator, Memory, Operations, ReduceOp, Window};

use super::{Measured, Operation};

type Result<T, E = unisono::Error> = std::result::Result<T, E>;

/// Sizes that are measured: powers of two between these.
const SIZES: std::ops::RangeInclusive<u32> = 9..=20;
/// The most that all ranks' outputs take together: all-gathers among many ranks end at a smaller size.
const MOST_OUTPUT_BYTES: usize = 256 << 20;
/// How long one turn should take, at most.
const TURN: Duration = Duration::from_millis(2);
/// The fewest turns of each algorithm.
const LEAST_TURNS: usize = 7;

/// Measures all sizes, as the rank that the environment says; rank 0 writes a line for each.
pub(super) fn run(time: Duration) -> Result<()> {
    let with = |name: &str, algorithm| {
        // Neither the settings nor an older tuning file may choose here.
        let builder = Builder::from_env()?.tune_file(None).algorithm(algorithm);
        builder.job(format!("tune-{name}")).build()
    };
    let one_shot = with("one-shot", AlgorithmChoice::OneShot)?;
    let two_shot = with("two-shot", AlgorithmChoice::TwoShot)?;
    let direct = with("direct", AlgorithmChoice::Direct)?;
    for operation in [Operation::AllReduce, Operation::Broadcast, Operation::AllGather] {
        for bytes in SIZES.map(|shift| 1usize << shift) {
            let outputs = outputs(operation, bytes, one_shot.world_size());
            if outputs * size_of::<f32>() * one_shot.world_size() > MOST_OUTPUT_BYTES {
                break;
            }
            let inputs = bytes / size_of::<f32>();
            let mut plain = Plain {
                communicators: [&one_shot, &two_shot],
                source: vec![1.0; inputs],
                target: vec![0.0; outputs],
            };
            let mut windows = Windows {
                communicator: &direct,
                source: direct.window(inputs, Memory::Host)?,
                target: direct.window(outputs, Memory::Host)?,
            };
            let (times, spread) = measure(operation, time, &mut plain, &mut windows)?;
            windows.close()?;
            let measured = Measured {
                operation,
                bytes,
                one_shot_us: times[0],
                two_shot_us: (operation == Operation::AllReduce).then_some(times[1]),
                direct_us: times[2],
                spread,
            };
            if one_shot.rank() == 0
                && let Ok(line) = serde_json::to_string(&measured)
            {
                // If the parent is gone, so are we.
                let _ = writeln!(std::io::stdout(), "{line}");
            }
        }
    }
    one_shot.destroy()?;
    two_shot.destroy()?;
    direct.destroy()
}

/// Elements of the output, for `bytes` of input.
fn outputs(operation: Operation, bytes: usize, world_size: usize) -> usize {
    let parts = if operation == Operation::AllGather { world_size } else { 1 };
    bytes / size_of::<f32>() * parts
}

/// The buffers of the staged algorithms.
struct Plain<'c> {
    communicators: [&'c Communicator; 2],
    source: Vec<f32>,
    target: Vec<f32>,
}

impl Plain<'_> {
    fn call(&mut self, operation: Operation, algorithm: usize) -> Result<()> {
        let communicator = self.communicators[algorithm];
        match operation {
            Operation::AllReduce => {
                communicator.all_reduce_into(&self.source, &mut self.target, ReduceOp::Sum)
            }
            Operation::Broadcast => communicator.broadcast_into(&self.source, &mut self.target, 0),
            Operation::AllGather => communicator.all_gather_into(&self.source, &mut self.target),
        }
    }
}

/// Those of direct.
struct Windows<'c> {
    communicator: &'c Communicator,
    source: Window<f32>,
    target: Window<f32>,
}

impl Windows<'_> {
    fn call(&mut self, operation: Operation) -> Result<()> {
        let (inputs, outputs) = (self.source.len(), self.target.len());
        let (source, target) = (self.source.range(0..inputs), self.target.range_mut(0..outputs));
        match operation {
            Operation::AllReduce => self.communicator.all_reduce_into(source, target, ReduceOp::Sum),
            Operation::Broadcast => self.communicator.broadcast_into(source, target, 0),
            Operation::AllGather => self.communicator.all_gather_into(source, target),
        }
    }

    fn close(self) -> Result<()> {
        self.source.close(self.communicator)?;
        self.target.close(self.communicator)
    }
}

/// The microseconds per call of one-shot, two-shot and direct, and how much longer the median turn of the worst took.
fn measure(
    operation: Operation,
    time: Duration,
    plain: &mut Plain<'_>,
    windows: &mut Windows<'_>,
) -> Result<([f64; 3], f64)> {
    let judge = plain.communicators[0];
    let mut timed = |algorithm: usize, calls: usize| -> Result<f64> {
        judge.barrier()?;
        let start = Instant::now();
        for _ in 0..calls {
            match algorithm {
                2 => windows.call(operation)?,
                staged => plain.call(operation, staged)?,
            }
        }
        let mut slowest = [start.elapsed().as_secs_f64() * 1e6 / calls as f64];
        judge.all_reduce(&mut slowest, ReduceOp::Max)?;
        Ok(slowest[0])
    };
    // All ranks see the same times, so they do the same number of calls and turns.
    let turn = TURN.min(time / LEAST_TURNS as u32).as_secs_f64();
    let mut calls = [1; 3];
    for (algorithm, calls) in calls.iter_mut().enumerate() {
        timed(algorithm, 8)?;
        let us = timed(algorithm, 8)?.max(0.01);
        *calls = ((turn * 1e6 / us) as usize).clamp(1, 20_000);
    }
    let turns = ((time.as_secs_f64() / turn.max(1e-9)) as usize).clamp(LEAST_TURNS, 10_000);
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..turns {
        for (algorithm, times) in times.iter_mut().enumerate() {
            times.push(timed(algorithm, calls[algorithm])?);
        }
    }
    let mut spread = 1f64;
    let quartiles = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        let quartile = times[times.len() / 4];
        spread = spread.max(times[times.len() / 2] / quartile.max(1e-3));
        quartile
    });
    Ok((quartiles, spread))
}
