//! Expert parallelism between processes: the random cases of `ep`, against the same naive reference.

#![allow(clippy::print_stderr, reason = "a rank tells its parent what went wrong")]

mod support;

#[path = "ep/case.rs"]
mod case;
#[path = "ep/low_latency.rs"]
mod low_latency;
#[path = "ep/throughput.rs"]
mod throughput;
#[path = "ep/world.rs"]
mod world;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use support::processes::{self, Orders};
use support::random;
use unisono::store::FileStore;
use unisono::{Communicator, Deadline, Result};

fn main() -> ExitCode {
    if let Some(orders) = Orders::from_env() {
        return match run_rank(&orders) {
            Ok(()) => {
                orders.report(&[]);
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let seed = random::seed();
    let test = |world_size: usize| {
        let run = move || processes::run(world_size, seed).map(drop).map_err(Into::into);
        Trial::test(format!("random_calls_in_a_world_of_{world_size}"), run)
    };
    // One world at a time: they would only slow each other down.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, [2, 4, 8].into_iter().map(test).collect()).exit_code()
}

fn run_rank(orders: &Orders) -> Result<()> {
    let deadline = Deadline::after(Duration::from_secs(30));
    let builder = Communicator::builder().store(Arc::new(FileStore::open(&orders.store, deadline)?));
    let communicator = builder.rank(orders.rank).world_size(orders.world_size).build()?;
    world::run(&communicator, orders.seed, (4, 4))?;
    communicator.destroy()
}
