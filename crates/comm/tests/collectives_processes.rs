//! Every operation between processes: one world per size runs every operation with every algorithm, dtype, reduction and
//! kind of size, in and out of place, then a long sequence without barriers, some of it in scopes and groups.
//!
//! The test program starts itself once for each rank. Afterwards the same calls are made by threads of this process,
//! which must give the same bits.

#![allow(clippy::print_stderr, reason = "a rank tells its parent what went wrong")]

mod support;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use support::processes::{self, Orders};
use support::random;
use support::rank::Rank;
use support::threads;
use support::verify::Digests;
use support::workload::{self, Workload};
use unisono::settings::AlgorithmChoice;
use unisono::store::{FileStore, MemoryStore, Store};
use unisono::{Communicator, Deadline};

const ALGORITHMS: [AlgorithmChoice; 4] =
    [AlgorithmChoice::Auto, AlgorithmChoice::OneShot, AlgorithmChoice::TwoShot, AlgorithmChoice::Direct];
const WORLD_SIZES: [usize; 8] = [1, 2, 3, 4, 5, 8, 16, 64];
const WINDOW_BYTES: usize = 3 << 20;

/// What a world of this size does: everything where it is cheap, a sample where ranks share cores.
const fn workload(world_size: usize) -> Workload {
    let all = usize::MAX;
    match world_size {
        1 => Workload { small: all, small_others: all, borders_ms: 200, sequence: 500, huge: false },
        2 => Workload { small: all, small_others: all, borders_ms: 1500, sequence: 2000, huge: true },
        3 => Workload { small: all, small_others: 800, borders_ms: 800, sequence: 1500, huge: false },
        5 => Workload { small: 600, small_others: 600, borders_ms: 1000, sequence: 1000, huge: false },
        4 | 8 => Workload { small: 300, small_others: 300, borders_ms: 1000, sequence: 500, huge: false },
        16 => Workload { small: 100, small_others: 100, borders_ms: 500, sequence: 150, huge: false },
        _ => Workload { small: 30, small_others: 0, borders_ms: 300, sequence: 20, huge: false },
    }
}

fn main() -> ExitCode {
    if let Some(orders) = Orders::from_env() {
        return match run_rank(&orders) {
            Ok(digests) => {
                orders.report(&[digests.common, digests.all]);
                ExitCode::SUCCESS
            }
            Err(problem) => {
                eprintln!("{problem}");
                ExitCode::FAILURE
            }
        };
    }
    let seed = random::seed();
    let test = |world_size| {
        let name = format!("every_operation_in_a_world_of_{world_size}");
        Trial::test(name, move || run_world(world_size, seed))
    };
    let trials = WORLD_SIZES.into_iter().map(test).collect();
    // One world at a time: they would only slow each other down.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn run_rank(orders: &Orders) -> Result<Digests, String> {
    let deadline = Deadline::after(Duration::from_secs(30));
    let store = FileStore::open(&orders.store, deadline).map_err(|error| error.to_string())?;
    run_calls(&(Arc::new(store) as Arc<dyn Store>), orders.rank, orders.world_size, orders.seed)
}

/// The calls of one rank, wherever it runs: one communicator for each algorithm, all over one store.
fn run_calls(store: &Arc<dyn Store>, rank: usize, world_size: usize, seed: u64) -> Result<Digests, String> {
    let join = |algorithm: AlgorithmChoice| {
        let name = format!("{algorithm:?}");
        let communicator = Communicator::builder()
            .store(store.clone())
            .rank(rank)
            .world_size(world_size)
            .job(name.as_str())
            .algorithm(algorithm)
            .timeout(Some(Duration::from_secs(60)))
            .build()?;
        Rank::new(communicator, &name, seed, WINDOW_BYTES)
    };
    let failed = |error: unisono::Error| format!("rank {rank} of {world_size}: {error}");
    // The largest world is about meeting and waiting: one communicator is enough.
    let algorithms = if world_size > 16 { &ALGORITHMS[..1] } else { &ALGORITHMS };
    let mut ranks = algorithms.iter().copied().map(join).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let digests = workload::run(seed, &mut ranks, &workload(world_size))?;
    ranks.into_iter().try_for_each(Rank::end).map_err(failed)?;
    Ok(digests)
}

fn run_world(world_size: usize, seed: u64) -> Result<(), Failed> {
    let reports: Vec<Digests> = processes::run(world_size, seed)?
        .into_iter()
        .map(|words| Digests { common: words[0], all: words[1] })
        .collect();
    let common: Vec<u64> = reports.iter().map(|report| report.common).collect();
    assert_eq!(common, vec![common[0]; world_size], "ranks differ, UNISONO_TEST_SEED={seed}");
    if world_size == 3 {
        let store = MemoryStore::new();
        let digests = threads::run(world_size, move |rank| {
            run_calls(&(Arc::new(store.clone()) as Arc<dyn Store>), rank, world_size, seed).unwrap()
        });
        assert_eq!(digests, reports, "threads and processes differ, UNISONO_TEST_SEED={seed}");
    }
    Ok(())
}
