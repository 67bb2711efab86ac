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
    println!("{:<28} {:>12} {:>12}", "", "call", "recorder");
    for world_size in [1, 2] {
        report(world_size, "barrier", |rank| rank.barrier())?;
        report(world_size, "all_reduce of 8 B", |rank| rank.all_reduce(&mut [1.0f64], ReduceOp::Sum))?;
    }
    report(2, "send and recv of 8 B", |rank| match rank.rank() {
        0 => rank.send(&[1.0f64], 1, 0).and_then(|()| rank.recv(&mut [0.0f64], 1, 0)),
        _ => rank.recv(&mut [0.0f64], 0, 0).and_then(|()| rank.send(&[1.0f64], 0, 0)),
    })
}

/// Measures `call` in a world of threads and prints what rank 0 saw.
fn report(
    world_size: usize,
    what: &str,
    call: impl Fn(&Communicator) -> Result<(), Error> + Copy + Send + 'static,
) -> Result<(), Error> {
    let (with, without) = (MemoryStore::new(), MemoryStore::new());
    let threads: Vec<_> = (0..world_size)
        .map(|rank| {
            let (with, without) = (with.clone(), without.clone());
            std::thread::spawn(move || {
                let build = |store: MemoryStore, is_on| {
                    let builder = Communicator::builder().store(Arc::new(store)).recorder(is_on);
                    builder.rank(rank).world_size(world_size).build()
                };
                measure(&build(with, true)?, &build(without, false)?, call)
            })
        })
        .collect();
    let results: Vec<_> = threads
        .into_iter()
        .map(|thread| thread.join().expect("a rank panicked"))
        .collect::<Result<_, _>>()?;
    let ranks = if world_size == 1 { "1 rank" } else { "2 ranks" };
    println!("{:<28} {:>9.1} ns {:>+9.1} ns", format!("{what}, {ranks}"), results[0].0, results[0].1);
    Ok(())
}

/// Median time of a call without the recorder, and median difference, in nanoseconds.
fn measure(
    with: &Communicator,
    without: &Communicator,
    call: impl Fn(&Communicator) -> Result<(), Error>,
) -> Result<(f64, f64), Error> {
    let batch = |communicator: &Communicator| {
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
