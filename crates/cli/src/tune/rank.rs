//! One rank of `unisono tune`: three communicators over the same ranks, each with one algorithm, timed in turns.
//!
//! Turns of a few milliseconds go round the algorithms until the time is used, so that a change of the machine's mood
//! hits all of them alike. A turn's time is that of the slowest rank; what counts is the lower quartile over turns. Direct
//! needs windows; the staged ones are timed on plain memory, where they do the same work.

use std::io::Write as _;
use std::time::{Duration, Instant};

use unisono::settings::AlgorithmChoice;
use unisono::tuning::DIRECT_FORMS;
use unisono::{Buf, BufMut, Builder, Communicator, Kind, Memory, Operations, ReduceOp, Window};

use super::Measured;

type Result<T, E = unisono::Error> = std::result::Result<T, E>;

/// Sizes that are measured: powers of two between these.
const SIZES: std::ops::RangeInclusive<u32> = 9..=20;
/// The sizes that are measured, in bytes per rank.
pub(super) fn sizes() -> impl Iterator<Item = usize> {
    SIZES.map(|shift| 1 << shift)
}

/// The most that the inputs or outputs of all ranks take together: among many ranks, operations with a part for each rank
/// end at a smaller size.
const MOST_BYTES: usize = 256 << 20;
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
    let ranks = one_shot.world_size();
    for kind in DIRECT_FORMS {
        for bytes in sizes() {
            let (inputs, outputs) = parts(kind, ranks);
            if bytes * inputs.max(outputs) * ranks > MOST_BYTES {
                break;
            }
            let (inputs, outputs) = (bytes / size_of::<f32>() * inputs, bytes / size_of::<f32>() * outputs);
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
            let (times, spread) = measure(kind, time, &mut plain, &mut windows)?;
            windows.close()?;
            let measured = Measured {
                operation: kind.name().to_owned(),
                bytes,
                one_shot_us: times[0],
                two_shot_us: matches!(kind, Kind::AllReduce { .. }).then_some(times[1]),
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

/// Parts of the input and of the output. Sides that only the root has are there on every rank: the others leave them.
const fn parts(kind: Kind, ranks: usize) -> (usize, usize) {
    match kind {
        Kind::AllGather | Kind::Gather { .. } => (1, ranks),
        Kind::ReduceScatter { .. } | Kind::Scatter { .. } => (ranks, 1),
        Kind::AllToAll => (ranks, ranks),
        _ => (1, 1),
    }
}

/// One call of an operation that has a direct form; the root is rank 0.
fn call(rank: &Communicator, kind: Kind, source: Buf<'_, f32>, target: BufMut<'_, f32>) -> Result<()> {
    let sum = ReduceOp::Sum;
    match kind {
        Kind::AllReduce { .. } => rank.all_reduce_into(source, target, sum),
        Kind::Broadcast { .. } => rank.broadcast_into(source, target, 0),
        Kind::AllGather => rank.all_gather_into(source, target),
        Kind::Reduce { .. } => rank.reduce_into(source, target, sum, 0),
        Kind::ReduceScatter { .. } => rank.reduce_scatter_into(source, target, sum),
        Kind::Gather { .. } => rank.gather(source, target, 0),
        Kind::Scatter { .. } => rank.scatter(source, target, 0),
        _ => rank.all_to_all_into(source, target),
    }
}

/// The buffers of the staged algorithms.
struct Plain<'c> {
    communicators: [&'c Communicator; 2],
    source: Vec<f32>,
    target: Vec<f32>,
}

impl Plain<'_> {
    fn call(&mut self, kind: Kind, algorithm: usize) -> Result<()> {
        call(self.communicators[algorithm], kind, (&self.source).into(), (&mut self.target).into())
    }
}

/// Those of direct.
struct Windows<'c> {
    communicator: &'c Communicator,
    source: Window<f32>,
    target: Window<f32>,
}

impl Windows<'_> {
    fn call(&mut self, kind: Kind) -> Result<()> {
        let (inputs, outputs) = (self.source.len(), self.target.len());
        let (source, target) = (self.source.range(0..inputs), self.target.range_mut(0..outputs));
        call(self.communicator, kind, source, target)
    }

    fn close(self) -> Result<()> {
        self.source.close(self.communicator)?;
        self.target.close(self.communicator)
    }
}

/// The microseconds per call of one-shot, two-shot and direct, and how much longer the median turn of the worst took.
fn measure(
    kind: Kind,
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
                2 => windows.call(kind)?,
                staged => plain.call(kind, staged)?,
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
