//! Who is left goes on: `shrink` after ranks left, in worlds of threads and in worlds that meet as processes do.
//! (Processes that are killed and stopped: `faults_processes`.)
#![allow(clippy::print_stdout, reason = "the seed of a run that fails")]

mod support;

use std::sync::{Arc, Barrier};
use std::time::Duration;

use support::random::{self, Random};
use support::threads::{on_built, on_threads};
use unisono::{Communicator, Error, Memory, Operations, ReduceOp};

/// Runs `rank` on both kinds of worlds.
fn on_both<R: Send + 'static>(
    world_size: usize,
    rank: impl Fn(Communicator) -> R + Send + Sync + Clone + 'static,
) -> [Vec<R>; 2] {
    let threads = on_threads(world_size, rank.clone());
    [threads, on_built(world_size, |builder| builder.timeout(Some(Duration::from_secs(50))), rank)]
}

/// The ranks of the world that are here, by their new ranks, and that a sum is right.
fn members(communicator: &Communicator, world_rank: usize) -> Result<Vec<u64>, Error> {
    let mut all = vec![0; communicator.world_size()];
    communicator.all_gather_into(&[world_rank as u64], &mut all)?;
    let mut sum = vec![world_rank as u64; 5000];
    communicator.all_reduce(&mut sum, ReduceOp::Sum)?;
    assert!(sum.iter().all(|got| *got == all.iter().sum()));
    Ok(all)
}

#[test]
fn all_go_on_when_nobody_is_lost() {
    for world_size in 1..=9 {
        on_both(world_size, move |communicator| {
            let world_rank = communicator.rank();
            communicator.barrier().unwrap();
            let mut next = communicator.shrink().unwrap();
            assert_eq!((next.rank(), next.generation()), (world_rank, 1));
            next = next.shrink().unwrap();
            assert_eq!((next.rank(), next.generation()), (world_rank, 2));
            assert_eq!(members(&next, world_rank).unwrap(), (0..world_size as u64).collect::<Vec<_>>());
            next.destroy().unwrap();
        });
    }
}

#[test]
fn ranks_that_left_are_left_out_and_the_others_keep_their_order() {
    on_both(5, |communicator| {
        let world_rank = communicator.rank();
        if world_rank % 3 == 0 {
            return;
        }
        let error = members(&communicator, world_rank).unwrap_err();
        assert!(error.to_string().ends_with("the others can go on with shrink()."), "{error}");
        let next = communicator.shrink().unwrap();
        assert_eq!(members(&next, world_rank).unwrap(), [1, 2, 4]);
        assert_eq!(next.local_rank(), next.rank());
        assert_eq!(next.topology().hosts()[0].ranks, [0, 1, 2]);
        next.destroy().unwrap();
    });
}

#[test]
fn the_last_rank_goes_on_alone() {
    on_both(3, |communicator| {
        if communicator.rank() == 1 {
            let next = communicator.shrink().unwrap();
            assert_eq!(members(&next, 1).unwrap(), [1]);
            next.duplicate().unwrap().destroy().unwrap();
            next.destroy().unwrap();
        }
    });
}

#[test]
fn windows_of_an_earlier_generation_say_so() {
    on_both(3, |communicator| {
        let world_rank = communicator.rank();
        let mut window = communicator.window::<u32>(3000, Memory::Host).unwrap();
        let closed_later = communicator.window::<u32>(1, Memory::Host).unwrap();
        let shared =
            communicator.window::<u32>(8, Memory::Host).unwrap().into_symmetric(&communicator).unwrap();
        if world_rank == 0 {
            return;
        }
        let next = communicator.shrink().unwrap();
        let expected = Error::Generation { window: 1, generation: 1 };
        assert_eq!(window.lend().unwrap_err(), expected);
        assert_eq!(next.all_reduce(window.range_mut(0..10), ReduceOp::Sum).unwrap_err(), expected);
        assert!(matches!(closed_later.close(&next), Err(Error::Generation { window: 2, generation: 1 })));
        let expected = Error::Generation { window: 3, generation: 1 };
        assert_eq!(shared.read(1, 0, &mut [0]).unwrap_err(), expected);
        assert_eq!(shared.wait_signal(0, 1, Duration::from_secs(20)).unwrap_err(), expected);
        let mut fresh = next.window::<u32>(3000, Memory::Host).unwrap();
        assert_eq!(fresh.id(), 4);
        fresh.lend().unwrap().fill(world_rank as u32);
        next.all_reduce(&mut fresh, ReduceOp::Sum).unwrap();
        assert_eq!(fresh.lend().unwrap()[2999], 3);
        next.barrier().unwrap();
        let next = next.shrink().unwrap();
        let error = next.all_reduce(window.range_mut(0..10), ReduceOp::Sum).unwrap_err();
        assert_eq!(error, Error::Generation { window: 1, generation: 2 });
        next.destroy().unwrap();
    });
}

#[test]
fn parents_and_children_shrink_apart() {
    on_both(4, |communicator| {
        let world_rank = communicator.rank();
        let child = communicator.split(Some(0), -(world_rank as i32)).unwrap().unwrap();
        if world_rank == 2 {
            drop(child);
        } else {
            assert!(matches!(child.barrier().unwrap_err(), Error::PeerLeft { rank: 1, .. }));
            let child = child.shrink().unwrap();
            assert_eq!(members(&child, world_rank).unwrap(), [3, 1, 0]);
            let pair = child.split((world_rank != 3).then_some(4), 0).unwrap();
            assert_eq!(pair.as_ref().map(Communicator::generation), (world_rank != 3).then_some(1));
            assert!(pair.is_none_or(|pair| members(&pair, world_rank).unwrap() == [1, 0]));
        }
        // The parent has all its ranks still, and is still in its first generation.
        assert_eq!(members(&communicator, world_rank).unwrap(), [0, 1, 2, 3]);
        assert_eq!(communicator.generation(), 0);
        communicator.destroy().unwrap();
    });
}

#[test]
fn who_does_not_come_is_named() {
    let all_are_done = Arc::new(Barrier::new(3));
    on_built(
        3,
        |builder| builder.timeout(Some(Duration::from_millis(400))),
        move |communicator| {
            if communicator.rank() != 1 {
                let error = communicator.shrink().unwrap_err();
                let Error::Timeout { call, missing, .. } = &error else { panic!("{error}") };
                assert_eq!((call.as_str(), missing.len()), ("shrink", 1), "{error}");
                assert!(missing[0].starts_with("rank 1 (host "), "{error}");
            }
            // Rank 1 lives, and does something else.
            all_are_done.wait();
        },
    );
}

#[test]
fn who_destroyed_its_communicator_is_not_waited_for() {
    let is_over = Arc::new(Barrier::new(3));
    on_both(3, move |communicator| {
        let world_rank = communicator.rank();
        if world_rank == 2 {
            // It ends in good order, and the others do not come.
            assert!(communicator.destroy().is_err());
        } else {
            let next = communicator.shrink().unwrap();
            assert_eq!(members(&next, world_rank).unwrap(), [0, 1]);
        }
        is_over.wait();
    });
}

/// Works until it fails, shrinks, and so on; leaves after as many calls as its number says.
fn survive(communicator: Communicator, lives: u64) -> Vec<Vec<u64>> {
    let world_rank = communicator.rank();
    let (mut communicator, mut generations, mut calls) = (communicator, Vec::new(), 0);
    loop {
        match members(&communicator, world_rank) {
            Ok(members) => {
                if generations.last() != Some(&members) {
                    generations.push(members);
                }
                calls += 1;
                if calls >= lives || communicator.world_size() == 1 {
                    return generations;
                }
            }
            Err(Error::PeerLeft { .. } | Error::Aborted { .. }) => {
                communicator = communicator.shrink().unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn ranks_leave_one_after_the_other_until_one_is_left() {
    let seed = random::seed();
    println!("UNISONO_TEST_SEED={seed}");
    for round in 0..12 {
        let mut random = Random::of(&[seed, round]);
        let world_size = 2 + random.below(7);
        // Some of them leave at the same time.
        let lives: Vec<u64> = (0..world_size).map(|_| 1 + 40 * random.below(5) as u64).collect();
        for generations in on_both(world_size, move |communicator| {
            let lives = lives[communicator.rank()];
            survive(communicator, lives)
        }) {
            // What two ranks were both part of, they saw in the same order.
            for one in &generations {
                for other in &generations {
                    let common = one.iter().filter(|members| other.contains(members));
                    let also = other.iter().filter(|members| one.contains(members));
                    assert!(
                        common.eq(also),
                        "{one:?} and {other:?}, UNISONO_TEST_SEED={seed}, round {round}"
                    );
                }
            }
        }
    }
}
