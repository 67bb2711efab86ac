//! Calls in flight: one thread that drives many ranks, ends by error and panic, patience and disagreement while nobody blocks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use unisono::settings::parse_duration;
use unisono::{Builder, Communicator, Error, Memory, Operations, ReduceOp, Stream, group};

use crate::support::random::{self, Random};
use crate::support::threads::{on_built, on_threads};

/// One thing that all ranks do.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    AllReduce,
    Broadcast {
        root: usize,
    },
    AllGather,
    AllToAll,
    Barrier,
    /// Everybody to the rank `by` further on.
    Shift {
        by: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct Action {
    kind: Kind,
    count: usize,
    number: u32,
}

fn draw(random: &mut Random, number: u32, world_size: usize) -> Action {
    let kind = match random.below(if world_size > 1 { 8 } else { 5 }) {
        0 => Kind::AllReduce,
        1 => Kind::Broadcast { root: random.below(world_size) },
        2 => Kind::AllGather,
        3 => Kind::AllToAll,
        4 => Kind::Barrier,
        _ => Kind::Shift { by: 1 + random.below(world_size - 1) },
    };
    let count = match random.below(8) {
        0 => 20_000 + random.below(100_000),
        1 | 2 => 1000 + random.below(9000),
        _ => random.below(40),
    };
    Action { kind, count, number }
}

/// What `rank` puts in.
fn input(action: &Action, rank: usize, world_size: usize) -> Vec<u32> {
    let parts = if action.kind == Kind::AllToAll { world_size } else { 1 };
    let mut random = Random::of(&[u64::from(action.number), rank as u64]);
    (0..action.count * parts).map(|_| random.next() as u32).collect()
}

/// What `rank` gets.
fn expected(action: &Action, rank: usize, world_size: usize) -> Vec<u32> {
    let inputs: Vec<_> = (0..world_size).map(|from| input(action, from, world_size)).collect();
    match action.kind {
        Kind::AllReduce => {
            (0..action.count).map(|at| inputs.iter().fold(0u32, |sum, of| sum.wrapping_add(of[at]))).collect()
        }
        Kind::Broadcast { root } => inputs[root].clone(),
        Kind::AllGather => inputs.concat(),
        Kind::AllToAll => {
            inputs.iter().flat_map(|of| of[rank * action.count..(rank + 1) * action.count].to_vec()).collect()
        }
        Kind::Barrier => Vec::new(),
        Kind::Shift { by } => inputs[(rank + world_size - by) % world_size].clone(),
    }
}

/// Submits an action; the handles of its one or two calls.
fn submit<'b, O: Operations<'b>>(
    on: &O,
    (rank, world_size): (usize, usize),
    action: &Action,
    source: &'b [u32],
    target: &'b mut [u32],
) -> Vec<O::Done> {
    let tag = action.number;
    let done = match action.kind {
        Kind::AllReduce => on.all_reduce_into(source, target, ReduceOp::Sum),
        Kind::Broadcast { root } => on.broadcast_into(source, target, root),
        Kind::AllGather => on.all_gather_into(source, target),
        Kind::AllToAll => on.all_to_all_into(source, target),
        Kind::Barrier => on.barrier(),
        Kind::Shift { by } => {
            let (to, from) = ((rank + by) % world_size, (rank + world_size - by) % world_size);
            if tag.is_multiple_of(3) {
                on.send_recv(source, to, target, from, tag)
            } else {
                let sent = on.send(source, to, tag).unwrap();
                return vec![sent, on.recv(target, from, tag).unwrap()];
            }
        }
    };
    vec![done.unwrap_or_else(|error| panic!("{action:?} on rank {rank}: {error}"))]
}

/// Buffers of some actions, on one rank.
struct Buffers {
    sources: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
}

impl Buffers {
    fn new(actions: &[Action], rank: usize, world_size: usize) -> Self {
        Self {
            sources: actions.iter().map(|action| input(action, rank, world_size)).collect(),
            targets: actions
                .iter()
                .map(|action| vec![0xa5a5_a5a5; expected(action, rank, world_size).len()])
                .collect(),
        }
    }

    fn verify(&self, actions: &[Action], rank: usize, world_size: usize, seed: u64) {
        for (action, target) in actions.iter().zip(&self.targets) {
            let expected = expected(action, rank, world_size);
            assert!(*target == expected, "{action:?} on rank {rank} of {world_size}, seed {seed}");
        }
    }
}

#[test]
fn one_thread_drives_all_ranks_of_a_world() {
    let seed = random::seed();
    for world_size in [1, 2, 5, 16] {
        let ranks = Communicator::threads(world_size).unwrap();
        let (mut random, stream) = (Random::of(&[seed]), Stream::host());
        for round in 0..20 {
            let actions: Vec<_> = (0..4).map(|at| draw(&mut random, round * 100 + at, world_size)).collect();
            let mut all: Vec<_> = (0..world_size).map(|me| Buffers::new(&actions, me, world_size)).collect();
            group(|group| {
                for (rank, buffers) in ranks.iter().zip(&mut all) {
                    let on = group.on(rank, &stream);
                    let Buffers { sources, targets } = buffers;
                    for (action, (source, target)) in actions.iter().zip(sources.iter().zip(targets)) {
                        submit(&on, (rank.rank(), world_size), action, source, target);
                    }
                }
                Ok(())
            })
            .unwrap();
            for (me, buffers) in all.iter().enumerate() {
                buffers.verify(&actions, me, world_size, seed);
            }
        }
    }
}

/// Two communicators over the same threads, used in opposite orders.
#[test]
fn the_order_of_communicators_in_a_group_does_not_matter() {
    let (left, right) = (Communicator::threads(2).unwrap(), Communicator::threads(2).unwrap());
    let pairs: Vec<_> = left.into_iter().zip(right).collect();
    let threads: Vec<_> = pairs
        .into_iter()
        .map(|(left, right)| {
            thread::spawn(move || {
                let stream = Stream::host();
                for count in [1usize, 1000, 200_000] {
                    let (mut a, mut b) = (vec![1u64; count], vec![2u64; count]);
                    let is_first = left.rank() == 0;
                    group(|group| {
                        let (left, right) = (group.on(&left, &stream), group.on(&right, &stream));
                        if is_first {
                            left.all_reduce(&mut a, ReduceOp::Sum)?;
                            right.all_reduce(&mut b, ReduceOp::Sum)
                        } else {
                            right.all_reduce(&mut b, ReduceOp::Sum)?;
                            left.all_reduce(&mut a, ReduceOp::Sum)
                        }
                    })
                    .unwrap();
                    assert!(a.iter().all(|x| *x == 2) && b.iter().all(|x| *x == 4));
                }
                left.destroy().unwrap();
                right.destroy().unwrap();
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn windows_work_in_scopes_too() {
    on_threads(3, |rank| {
        let mut window = rank.window::<u32>(50_000, Memory::Host).unwrap();
        for round in 0..10 {
            window.lend().unwrap().fill(rank.rank() as u32 + round);
            let mut small = [1u64];
            rank.scope(|scope| {
                let large = scope.all_reduce(&mut window, ReduceOp::Sum)?;
                let _small = scope.all_reduce(&mut small, ReduceOp::Sum)?;
                large.wait()
            })
            .unwrap();
            assert_eq!((window.lend().unwrap()[49_999], small[0]), (3 + 3 * round, 3));
        }
        window.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_panic_in_a_scope_aborts_and_leaves_the_buffers_alone() {
    let results = on_threads(2, |rank| {
        let mut x = vec![7u32; 500_000];
        if rank.rank() == 1 {
            let mut y = vec![0u32; 500_000];
            return rank
                .all_reduce(&mut y, ReduceOp::Sum)
                .and_then(|()| rank.barrier())
                .unwrap_err()
                .to_string();
        }
        let result = catch_unwind(AssertUnwindSafe(|| {
            rank.scope(|scope| {
                let _large = scope.all_reduce(&mut x, ReduceOp::Sum)?;
                panic!("on purpose");
                #[allow(unreachable_code)]
                Ok(())
            })
        }));
        assert!(result.is_err());
        let before = x.clone();
        thread::sleep(Duration::from_millis(20));
        assert!(x == before);
        rank.barrier().unwrap_err().to_string()
    });
    for error in results {
        assert!(error.contains("rank 0") && error.contains("panic"), "{error}");
    }
}

#[test]
fn a_scope_that_ends_by_an_error_completes_what_it_started() {
    on_threads(2, |rank| {
        let mut x = vec![1u32; 300_000];
        let result: unisono::Result<()> = rank.scope(|scope| {
            let _pending = scope.all_reduce(&mut x, ReduceOp::Sum)?;
            // An error of the caller's own: the communicator is not concerned.
            rank.send(&[0u8], 77, 0)
        });
        assert!(matches!(result, Err(Error::Argument { .. })), "{result:?}");
        assert!(x.iter().all(|x| *x == 2));
        rank.destroy().unwrap();
    });
}

#[test]
fn who_only_tests_runs_out_of_patience_too() {
    let impatient = |builder: Builder| builder.timeout(parse_duration("300ms"));
    on_built(2, impatient, |rank| {
        if rank.rank() == 1 {
            // Comes too late, and is told so.
            thread::sleep(Duration::from_millis(900));
            assert!(matches!(rank.barrier(), Err(Error::Timeout { .. })));
            return;
        }
        let start = Instant::now();
        let result = rank.scope(|scope| {
            let mut pending = scope.barrier()?;
            while !pending.test()? {}
            Ok(())
        });
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert!(error.to_string().contains("rank 1"), "{error}");
        assert!(start.elapsed() >= Duration::from_millis(300));
    });
}

#[test]
fn who_only_tests_learns_of_different_calls() {
    // Two roots of broadcasts: neither hears the other. One then waits for credit, the other for a message.
    on_threads(2, |rank| {
        let (mut large, mut small, mut never) = (vec![0u8; 4_000_000], [0u8], [0u8]);
        let result = rank.scope(|scope| {
            let mut pending = if rank.rank() == 0 {
                scope.broadcast(&mut large, 0)?
            } else {
                scope.broadcast(&mut small, 1)?.wait()?;
                scope.recv(&mut never, 0, 1)?
            };
            while !pending.test()? {}
            Ok(())
        });
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        assert!(error.to_string().contains("4000000") && error.to_string().contains("root 1"), "{error}");
    });
}

#[test]
fn who_leaves_while_others_test_is_named() {
    on_threads(3, |rank| {
        if rank.rank() == 2 {
            return;
        }
        let result = rank.scope(|scope| {
            let mut pending = scope.barrier()?;
            while !pending.test()? {}
            Ok(())
        });
        let error = result.unwrap_err();
        assert!(error.to_string().contains("rank 2"), "{error}");
    });
}

#[test]
fn bad_arguments_in_a_group_post_nothing() {
    on_threads(2, |rank| {
        let stream = Stream::host();
        let (mut x, mut y) = ([1u32; 4], [1u32; 3]);
        let result = group(|group| {
            let on = group.on(&rank, &stream);
            on.all_reduce(&mut x, ReduceOp::Sum)?;
            on.all_gather(&mut y)
        });
        assert!(matches!(result, Err(Error::Argument { .. })), "{result:?}");
        // Nothing is in flight: the next call is the first.
        rank.barrier().unwrap();
        assert_eq!((x, y), ([1; 4], [1; 3]));
        rank.destroy().unwrap();
    });
}
