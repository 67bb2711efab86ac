//! Ranks that make different calls: both get an error that names both calls, at once where somebody receives, and at the
//! latest when their credit ends where both only produce.

use unisono::{Communicator, Error, Memory, Operations, ReduceOp, Result};
use unisono_core::layout::CALL_SLOTS;

use crate::support::threads::{on_built, on_threads};

/// A call, and how messages name it on a rank, when it is call number `number`.
struct Attempt {
    call: fn(&Communicator) -> Result<()>,
    name: &'static str,
    arguments: &'static str,
}

const fn attempt(
    name: &'static str,
    arguments: &'static str,
    call: fn(&Communicator) -> Result<()>,
) -> Attempt {
    Attempt { call, name, arguments }
}

/// Calls for two ranks, all different, small and large, with and without data, and collective ones that move nothing.
const ATTEMPTS: [Attempt; 28] = [
    attempt("barrier", "", |world| world.barrier()),
    attempt("all_reduce", " (f32, 4, sum)", |world| world.all_reduce(&mut [0f32; 4], ReduceOp::Sum)),
    attempt("all_reduce", " (f32, 4, max)", |world| world.all_reduce(&mut [0f32; 4], ReduceOp::Max)),
    attempt("all_reduce", " (f32, 5, sum)", |world| world.all_reduce(&mut [0f32; 5], ReduceOp::Sum)),
    attempt("all_reduce", " (i32, 4, sum)", |world| world.all_reduce(&mut [0i32; 4], ReduceOp::Sum)),
    attempt("all_reduce", " (f32, 70000, sum)", |world| {
        world.all_reduce(&mut vec![0f32; 70_000], ReduceOp::Sum)
    }),
    attempt("all_reduce", " (f32, 500000, sum)", |world| {
        world.all_reduce(&mut vec![0f32; 500_000], ReduceOp::Sum)
    }),
    attempt("all_gather", " (u8, 1)", |world| world.all_gather(&mut [0u8; 2])),
    attempt("all_gather", " (u8, 900000)", |world| world.all_gather(&mut vec![0u8; 1_800_000])),
    attempt("broadcast", " (u8, 1, root 0)", |world| world.broadcast(&mut [0u8], 0)),
    attempt("broadcast", " (u8, 1, root 1)", |world| world.broadcast(&mut [0u8], 1)),
    attempt("broadcast", " (u8, 900000, root 0)", |world| world.broadcast(&mut vec![0u8; 900_000], 0)),
    attempt("broadcast", " (u8, 900000, root 1)", |world| world.broadcast(&mut vec![0u8; 900_000], 1)),
    attempt("reduce", " (f32, 4, sum, root 0)", |world| world.reduce(&mut [0f32; 4], ReduceOp::Sum, 0)),
    attempt("reduce", " (f32, 70000, sum, root 1)", |world| {
        world.reduce(&mut vec![0f32; 70_000], ReduceOp::Sum, 1)
    }),
    attempt("reduce_scatter", " (f32, 2, sum)", |world| world.reduce_scatter(&mut [0f32; 4], ReduceOp::Sum)),
    attempt("gather", " (u8, 3, root 1)", |world| world.gather(&[1; 3], &mut [0u8; 6], 1)),
    attempt("gather", " (u8, 900000, root 0)", |world| {
        world.gather(&vec![1; 900_000], &mut vec![0u8; 1_800_000], 0)
    }),
    attempt("scatter", " (u8, 3, root 0)", |world| world.scatter(&[1; 6], &mut [0u8; 3], 0)),
    attempt("all_to_all", " (u16, 4)", |world| world.all_to_all(&mut [0u16; 8])),
    attempt("all_gather_v", " (u8, 3 in parts #", |world| {
        world.all_gather_v(&[1; 3][..1 + world.rank()], &mut [0u8; 3], &[1, 2])
    }),
    attempt("reduce_scatter_v", " (u8, 3, max in parts #", |world| {
        world.reduce_scatter_v(&[1; 3], &mut [0u8; 3][..1 + world.rank()], &[1, 2], ReduceOp::Max)
    }),
    attempt("gather_v", " (u8, 3, root 0 in parts #", |world| {
        world.gather_v(&[1; 3][..1 + world.rank()], &mut [0u8; 3], &[1, 2], 0)
    }),
    attempt("scatter_v", " (u8, 3, root 1 in parts #", |world| {
        world.scatter_v(&[1; 3], &mut [0u8; 3][..1 + world.rank()], &[1, 2], 1)
    }),
    attempt("all_to_all_v", " (u8, 0)", |world| world.all_to_all_v(&[1; 2], &[1, 1], &mut [0u8; 2], &[1, 1])),
    attempt("all_reduce_multi", " (f32, 4, sum, 1 buffer)", |world| {
        world.all_reduce_multi(vec![(&mut [0f32; 4]).into()], ReduceOp::Sum)
    }),
    attempt("broadcast_multi", " (u8, 1, root 0, its buffer 0)", |world| {
        world.broadcast_multi(vec![(&mut [0u8]).into()], 0, 0)
    }),
    attempt("window", " (u64, 3)", |world| world.window::<u64>(3, Memory::Host).map(drop)),
];

impl Attempt {
    fn describe(&self, number: usize, rank: usize) -> String {
        format!("{} #{number} on rank {rank}{}", self.name, self.arguments)
    }
}

/// Makes the call, then barriers until one fails.
fn until_it_fails(communicator: &Communicator, attempt: &Attempt) -> Error {
    let later = (0..=CALL_SLOTS).map(|_| communicator.barrier());
    let first = std::iter::once((attempt.call)(communicator));
    first.chain(later).find_map(Result::err).expect("a mismatch is found within the credit")
}

fn names_both(error: &Error, calls: [String; 2]) {
    let Error::Mismatch { left, right } = error else { panic!("expected {calls:?}, got {error}") };
    let mut got = [left.clone(), right.clone()];
    if got[0].contains("on rank 1") {
        got.reverse();
    }
    // The hash of parts is not ours to know.
    let fits = |(got, expected): (&String, &String)| match expected.ends_with('#') {
        true => got.starts_with(expected),
        false => got == expected,
    };
    assert!(got.iter().zip(&calls).all(fits), "{got:?} instead of {calls:?}");
}

#[test]
fn every_pair_of_different_calls_is_named_on_both_sides() {
    for left in 0..ATTEMPTS.len() {
        for right in (0..ATTEMPTS.len()).filter(|right| *right != left) {
            let errors = on_threads(2, move |communicator| {
                for _ in 0..(left * 7 + right) % 40 {
                    communicator.barrier().unwrap();
                }
                let mine = &ATTEMPTS[if communicator.rank() == 0 { left } else { right }];
                let error = until_it_fails(&communicator, mine);
                // The first cause stands.
                assert_eq!(communicator.barrier().unwrap_err(), error);
                assert_eq!(communicator.check().unwrap_err(), error);
                error
            });
            let number = (left * 7 + right) % 40 + 1;
            let calls = [ATTEMPTS[left].describe(number, 0), ATTEMPTS[right].describe(number, 1)];
            for error in errors {
                names_both(&error, calls.clone());
            }
        }
    }
}

#[test]
fn ranks_that_meet_as_processes_do_are_told_too() {
    for (left, right) in [(0, 1), (1, 2), (9, 10), (11, 12), (6, 5), (27, 0), (14, 17)] {
        let errors = on_built(
            2,
            |builder| builder,
            move |communicator| {
                let mine = &ATTEMPTS[if communicator.rank() == 0 { left } else { right }];
                until_it_fails(&communicator, mine)
            },
        );
        for error in errors {
            names_both(&error, [ATTEMPTS[left].describe(1, 0), ATTEMPTS[right].describe(1, 1)]);
        }
    }
}

#[test]
fn two_roots_that_only_send_are_found_when_their_credit_ends() {
    let results = on_threads(2, |communicator| {
        let root = communicator.rank();
        let mut calls = 0;
        let error = loop {
            calls += 1;
            assert!(calls <= 2 * CALL_SLOTS, "never found");
            if let Err(error) = communicator.broadcast(&mut [1u8], root) {
                break error;
            }
        };
        (calls, error)
    });
    for (calls, error) in results {
        assert!(calls <= CALL_SLOTS + 1, "found at call {calls}");
        names_both(
            &error,
            [
                "broadcast #1 on rank 0 (u8, 1, root 0)".into(),
                "broadcast #1 on rank 1 (u8, 1, root 1)".into(),
            ],
        );
    }
}

#[test]
fn a_difference_between_roots_is_found_by_destroy() {
    let errors = on_threads(2, |communicator| {
        communicator.broadcast(&mut [1u8], communicator.rank()).unwrap();
        communicator.destroy().unwrap_err()
    });
    for error in errors {
        names_both(
            &error,
            [
                "broadcast #1 on rank 0 (u8, 1, root 0)".into(),
                "broadcast #1 on rank 1 (u8, 1, root 1)".into(),
            ],
        );
    }
}

#[test]
fn one_rank_of_three_that_differs_fails_all_three() {
    let errors = on_threads(3, |communicator| {
        communicator.barrier().unwrap();
        let count = if communicator.rank() == 2 { 9 } else { 8 };
        let first = communicator.all_reduce(&mut vec![0u64; count], ReduceOp::Min);
        first.and_then(|()| communicator.barrier()).unwrap_err()
    });
    for error in errors {
        let Error::Mismatch { left, right } = &error else { panic!("{error}") };
        let text = format!("{left} {right}");
        assert!(text.contains("all_reduce #2 on rank 2 (u64, 9, min)"), "{text}");
        assert!(text.contains("(u64, 8, min)"), "{text}");
    }
}

#[test]
fn more_calls_on_one_rank_than_on_the_other_are_a_mismatch() {
    let errors = on_threads(2, |communicator| {
        if communicator.rank() == 0 {
            communicator.barrier().unwrap_err()
        } else {
            communicator.destroy().unwrap_err()
        }
    });
    for error in errors {
        names_both(&error, ["barrier #1 on rank 0".into(), "destroy #1 on rank 1".into()]);
    }
}
