//! Every operation between threads, and what else a communicator promises: arguments that are refused without harm,
//! calls that differ, ranks that leave, windows, messages, calls in flight, observers and deadlines.
//!
//! The same cases as between processes, in worlds of up to 64 ranks that share one mapping.

#[path = "../support/mod.rs"]
mod support;

mod arguments;
mod binding;
mod counted;
mod departures;
mod determinism;
mod groups;
mod in_flight;
mod messages;
mod mismatches;
mod observers;
mod quantised;
mod rows;
mod uneven;
mod windows;

use std::time::Duration;

use support::random;
use support::rank::Rank;
use support::threads::{on_built, on_threads};
use support::verify::Digests;
use support::workload::{self, Workload};
use unisono::settings::AlgorithmChoice;
use unisono::{Builder, Communicator};

/// All that `communicator` does for `workload`, in windows of 1 MiB.
fn run_cases(
    communicator: Communicator,
    name: &str,
    seed: u64,
    workload: &Workload,
) -> Result<Digests, String> {
    let mut ranks = [Rank::new(communicator, name, seed, 1 << 20).map_err(|error| error.to_string())?];
    let digests = workload::run(seed, &mut ranks, workload)?;
    let [rank] = ranks;
    rank.end().map_err(|error| error.to_string())?;
    Ok(digests)
}

/// Runs `workload` on threads; every rank must have seen the same, where all get the same.
fn run_threads(world_size: usize, workload: Workload) {
    let seed = random::seed();
    let digests = on_threads(world_size, move |communicator| {
        run_cases(communicator, "threads", seed, &workload).unwrap_or_else(|problem| panic!("{problem}"))
    });
    let common: Vec<u64> = digests.iter().map(|digests| digests.common).collect();
    assert_eq!(common, vec![common[0]; world_size], "UNISONO_TEST_SEED={seed}");
}

#[test]
fn one_thread_runs_every_operation() {
    run_threads(
        1,
        Workload { small: usize::MAX, small_others: 0, borders_ms: 200, sequence: 200, huge: false },
    );
}

#[test]
fn two_threads_run_every_operation() {
    run_threads(
        2,
        Workload { small: usize::MAX, small_others: 0, borders_ms: 800, sequence: 500, huge: false },
    );
}

#[test]
fn five_threads_run_every_operation() {
    run_threads(5, Workload { small: 500, small_others: 0, borders_ms: 800, sequence: 500, huge: false });
}

#[test]
fn eight_threads_survive_a_long_sequence_without_barriers() {
    run_threads(8, Workload { small: 0, small_others: 0, borders_ms: 300, sequence: 2000, huge: false });
}

#[test]
fn sixty_four_threads_run_every_kind_of_operation() {
    run_threads(64, Workload { small: 40, small_others: 0, borders_ms: 600, sequence: 60, huge: false });
}

#[test]
fn threads_that_meet_as_processes_do_get_the_same_bits_with_every_algorithm() {
    let seed = random::seed();
    let workload = Workload { small: 200, small_others: 0, borders_ms: 200, sequence: 100, huge: false };
    let mut all = Vec::new();
    for algorithm in
        [AlgorithmChoice::Auto, AlgorithmChoice::OneShot, AlgorithmChoice::TwoShot, AlgorithmChoice::Direct]
    {
        all.push(on_built(
            3,
            move |builder| with_algorithm(builder, algorithm),
            move |communicator| {
                let name = format!("{algorithm:?}");
                run_cases(communicator, &name, seed, &workload).unwrap_or_else(|problem| panic!("{problem}"))
            },
        ));
    }
    assert_eq!(all, vec![all[0].clone(); 4], "UNISONO_TEST_SEED={seed}");
    let common: Vec<u64> = all.concat().iter().map(|digests| digests.common).collect();
    assert_eq!(common, vec![common[0]; 12], "UNISONO_TEST_SEED={seed}");
}

fn with_algorithm(builder: Builder, algorithm: AlgorithmChoice) -> Builder {
    builder.algorithm(algorithm).timeout(Some(Duration::from_secs(60)))
}
