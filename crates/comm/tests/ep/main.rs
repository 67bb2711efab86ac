//! Expert parallelism between threads: random calls against a naive reference, the life of a buffer, what is refused, and ranks that leave
//! or fall silent.

#[path = "../support/mod.rs"]
mod support;

mod case;
mod departures;
mod life;
mod low_latency;
#[path = "../../examples/moe_training.rs"]
mod moe_training;
mod order;
mod overtaking;
mod refusals;
mod throughput;
mod training;
mod world;

use support::random;
use support::threads::on_threads;

fn run(ranks: usize, sizes: (u64, u64)) {
    let seed = random::seed();
    on_threads(ranks, move |communicator| {
        world::run(&communicator, seed, sizes)
            .unwrap_or_else(|error| panic!("{error}, UNISONO_TEST_SEED={seed}"));
        communicator.destroy().unwrap();
    });
}

#[test]
fn one_rank_has_all_experts() {
    run(1, (12, 4));
}

#[test]
fn two_ranks() {
    run(2, (12, 4));
}

#[test]
fn three_ranks() {
    run(3, (8, 4));
}

#[test]
fn eight_ranks() {
    run(8, (6, 4));
}

#[test]
fn sixty_four_ranks() {
    run(64, (2, 2));
}
