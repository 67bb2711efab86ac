//! Hangs on purpose, in one of several ways, so that somebody can look: `unisono why`, `top` and `dump`.
//!
//! ```text
//! cargo build --release -p unisono --example hang
//! unisono run -n 3 -- target/release/examples/hang stop &
//! unisono why
//! ```
//! After three good rounds the last rank does something else. What, says the argument:
//!
//! | way | the last rank |
//! | --- | --- |
//! | stop | stops itself (SIGSTOP) in front of an all-reduce |
//! | sleep | sleeps in front of it, as if it computed |
//! | skip | leaves it out and waits for a message that comes only after it |
//! | other | makes another call; all ranks get the error and then sleep |
//! | message | sends a message with tag 6, while rank 0 waits for one with tag 5 |
//! | circle | every rank receives from its neighbour before it sends |

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program that people run

use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use unisono::{Builder, Communicator, Error, Operations, ReduceOp};

/// Longer than anybody looks.
const LONG: Duration = Duration::from_secs(3600);
const WAYS: [&str; 6] = ["stop", "sleep", "skip", "other", "message", "circle"];

fn main() -> ExitCode {
    let way = std::env::args().nth(1).unwrap_or_default();
    if !WAYS.contains(&way.as_str()) {
        eprintln!("usage: unisono run -n 3 -- hang {}", WAYS.join("|"));
        return ExitCode::from(2);
    }
    match run(&way) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Hangs in this way.
pub(crate) fn run(way: &str) -> Result<(), Error> {
    // With the usual liveness a stopped rank is given up after 3 s, and there is nothing left to look at.
    let rank = Builder::from_env()?.liveness(LONG).timeout(None).warn_after(None).build()?;
    let result = hang(way, &rank);
    if let Err(error) = &result {
        // While the communicator is there, it can be looked at.
        eprintln!("{error}");
        std::thread::sleep(LONG);
    }
    result
}

fn hang(way: &str, rank: &Communicator) -> Result<(), Error> {
    let mut sums = vec![1.0f32; 4096];
    for _ in 0..3 {
        rank.all_reduce(&mut sums, ReduceOp::Avg)?;
        rank.barrier()?;
    }
    let last = rank.world_size() - 1;
    println!("three rounds are done; now {way}");
    match way {
        "circle" => circle(rank),
        "message" => message(rank),
        _ if rank.rank() == last => mishap(way, rank, &mut sums),
        _ => {
            rank.all_reduce(&mut sums, ReduceOp::Sum)?;
            if way == "skip" && rank.rank() == 0 {
                rank.send(&sums, last, 1)?;
            }
            rank.barrier()
        }
    }
}

/// What the last rank does instead of the call that the others make.
fn mishap(way: &str, rank: &Communicator, sums: &mut [f32]) -> Result<(), Error> {
    match way {
        "stop" => {
            kill_process(getpid(), Signal::STOP).expect("a process may stop itself");
            // Another thread may be the one that takes the signal, a moment later.
            std::thread::sleep(Duration::from_secs(1));
        }
        "sleep" => std::thread::sleep(LONG),
        "skip" => rank.recv(sums, 0, 1)?,
        _ => rank.broadcast(sums, 0)?,
    }
    rank.barrier()
}

fn message(rank: &Communicator) -> Result<(), Error> {
    let last = rank.world_size() - 1;
    if rank.rank() == 0 {
        rank.recv(&mut [0.0f32; 4], last, 5)?;
    } else if rank.rank() == last {
        rank.send(&[1.0f32; 4], 0, 6)?;
    }
    rank.barrier()
}

fn circle(rank: &Communicator) -> Result<(), Error> {
    let world_size = rank.world_size();
    rank.recv(&mut [0.0f32; 4], (rank.rank() + 1) % world_size, 0)?;
    rank.send(&[1.0f32; 4], (rank.rank() + world_size - 1) % world_size, 0)?;
    rank.barrier()
}
