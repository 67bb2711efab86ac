//! How fast one-sided memory is: the round trip of a signal between two threads, and what one rank writes and reads.
//!
//! ```text
//! cargo run --release -p unisono --example one_sided_speed
//! ```
//! Medians over batches. The rank that is written to and read from does nothing meanwhile.

#![allow(clippy::print_stdout)] // a program that people run

use std::time::{Duration, Instant};

use unisono::{Communicator, Error, Memory, Symmetric};

const BATCHES: usize = 101;
const ROUND_TRIPS: u32 = 2000;
const SIZES: [usize; 5] = [4 << 10, 64 << 10, 1 << 20, 4 << 20, 64 << 20];
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Error> {
    let threads: Vec<_> = Communicator::threads(2)?
        .into_iter()
        .map(|rank| std::thread::spawn(move || measure(&rank)))
        .collect();
    for thread in threads {
        match thread.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    Ok(())
}

fn measure(rank: &Communicator) -> Result<(), Error> {
    let largest = SIZES[SIZES.len() - 1];
    let memory = rank.window::<u8>(largest, Memory::Host)?.into_symmetric(rank)?;
    let (me, peer) = (rank.rank(), 1 - rank.rank());
    let mut times = Vec::new();
    for batch in 0..BATCHES as u32 {
        let start = Instant::now();
        for trip in 0..ROUND_TRIPS {
            let value = batch * ROUND_TRIPS + trip + 1;
            if me == 0 {
                memory.signal(peer, 0, value)?;
            }
            memory.wait_signal(0, value, PATIENCE)?;
            if me == 1 {
                memory.signal(peer, 0, value)?;
            }
        }
        times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS));
    }
    if me == 0 {
        println!("round trip of a signal: {:.2} µs", median(&mut times));
        println!("{:>10} {:>12} {:>12}", "bytes", "write", "read");
        for size in SIZES {
            speed(&memory, size)?;
        }
        return memory.signal(peer, 1, 1);
    }
    memory.wait_signal(1, 1, PATIENCE)
}

/// What rank 0 writes to rank 1 and reads from it.
fn speed(memory: &Symmetric<u8>, size: usize) -> Result<(), Error> {
    let mut ours = vec![1u8; size];
    let calls = ((16 << 20) / size).max(1);
    let mut gigabytes = [0.0; 2];
    for (kind, result) in gigabytes.iter_mut().enumerate() {
        let mut times = Vec::new();
        for _ in 0..BATCHES.min(1 + (1 << 30) / (size * calls)) {
            let start = Instant::now();
            for _ in 0..calls {
                if kind == 0 { memory.write(1, 0, &ours)? } else { memory.read(1, 0, &mut ours)? }
            }
            times.push(start.elapsed().as_secs_f64());
        }
        *result = (size * calls) as f64 / median(&mut times) / 1e9;
    }
    println!("{size:>10} {:>7.1} GB/s {:>7.1} GB/s", gigabytes[0], gigabytes[1]);
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
