//! What the flight recorder costs per call: pairs of batches, one with and one without it, in one process.
//!
//! ```text
//! cargo run --release -p unisono --example recorder_cost
//! ```
//! Each pair runs 2,000 calls on a communicator that records and 2,000 on one that does not, in turning order; the difference of
//! a pair is divided by the calls. The median over all pairs is printed, and the time of a call without the recorder.

#![allow(clippy::print_stdout)] // a program that people run

use std::sync::Arc;
use std::time::{Duration, Instant};

use unisono::store::MemoryStore;
use unisono::{Communicator, Error, Operations, ReduceOp};

const CALLS: u32 = 2000;
const PAIRS: usize = 300;

fn main() -> Result<(), Error> {
    println!("{:<36} {:>12} {:>12}", "per call", "without", "recorder");
    let sum = |rank: &Communicator| rank.all_reduce(&mut [1.0f64], ReduceOp::Sum);
    alone("barrier, 1 rank", 1, |ranks| ranks[0].barrier())?;
    alone("all_reduce of 8 B, 1 rank", 1, move |ranks| sum(&ranks[0]))?;
    // Both ranks in one thread: what each does is complete at once, so that no scheduler has a say.
    alone("broadcast of 8 B, 2 ranks in turn", 2, |ranks| {
        ranks.iter().try_for_each(|rank| rank.broadcast(&mut [1.0f64], 0))
    })?;
    alone("send and recv of 8 B, in turn", 2, |ranks| {
        ranks[0].send(&[1.0f64], 1, 0)?;
        ranks[1].recv(&mut [0.0f64], 0, 0)
    })?;
    let threads: Vec<_> = world(2, true)?
        .into_iter()
        .zip(world(2, false)?)
        .map(|(with, without)| {
            std::thread::spawn(move || measure(&[with], &[without], move |ranks| sum(&ranks[0])))
        })
        .collect();
    let mut results = threads.into_iter().map(|thread| thread.join().expect("a rank panicked"));
    if let Some(result) = results.next() {
        print("all_reduce of 8 B, 2 threads", result?);
    }
    Ok(())
}

/// Measures `call` on all ranks of a world in this thread; per call of each rank.
fn alone(
    what: &str,
    world_size: usize,
    call: impl Fn(&[Communicator]) -> Result<(), Error>,
) -> Result<(), Error> {
    let (plain, difference) = measure(&world(world_size, true)?, &world(world_size, false)?, call)?;
    let ranks = world_size as f64;
    print(what, (plain / ranks, difference / ranks));
    Ok(())
}

fn print(what: &str, (plain, difference): (f64, f64)) {
    println!("{what:<36} {plain:>9.1} ns {difference:>+9.1} ns");
}

/// A world whose ranks are threads while they meet.
fn world(world_size: usize, records: bool) -> Result<Vec<Communicator>, Error> {
    let store = MemoryStore::new();
    let threads: Vec<_> = (0..world_size)
        .map(|rank| {
            let builder = Communicator::builder().store(Arc::new(store.clone())).recorder(records);
            std::thread::spawn(move || builder.rank(rank).world_size(world_size).build())
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
}

/// Median time of a call without the recorder, and median difference, in nanoseconds.
fn measure(
    with: &[Communicator],
    without: &[Communicator],
    call: impl Fn(&[Communicator]) -> Result<(), Error>,
) -> Result<(f64, f64), Error> {
    let batch = |communicator: &[Communicator]| {
        for _ in 0..CALLS / 10 {
            call(communicator)?;
        }
        let start = Instant::now();
        for _ in 0..CALLS {
            call(communicator)?;
        }
        Ok::<Duration, Error>(start.elapsed())
    };
    let (mut plain, mut differences) = (Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        let (recorded, other) = match pair % 2 {
            0 => (batch(with)?, batch(without)?),
            _ => {
                let other = batch(without)?;
                (batch(with)?, other)
            }
        };
        let per_call = |time: Duration| time.as_secs_f64() * 1e9 / f64::from(CALLS);
        plain.push(per_call(other));
        differences.push(per_call(recorded) - per_call(other));
    }
    Ok((median(plain), median(differences)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
