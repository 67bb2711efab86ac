//! Ranks that leave between any two steps of a shrink, others that are given up in the middle of one, and what stays in
//! memory.

use std::sync::Mutex;

use unisono_node::memory::quarantined_bytes;

use super::*;
use crate::operations::Operations;

/// Runs `rank` on every rank of a world of threads.
fn on_threads<R: Send>(world_size: usize, rank: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    let ranks = Communicator::threads(world_size).unwrap();
    std::thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = ranks.into_iter().map(|one| scope.spawn(move || rank(one))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Takes part in a shrink until `steps` actions are done, the next one undone, and leaves; once it has decided, in the next
/// generation. True if it left before.
fn leave_after(communicator: Communicator, steps: usize) -> bool {
    communicator.control.fail(&Cause::Aborted { rank: 0, reason: "a test".into() });
    let mut regrouping = Regrouping::new(&communicator);
    let (mut done, mut was_early) = (0, false);
    while !was_early && regrouping.agreement.outcome().is_none() {
        regrouping.look_for_losses();
        while let Some(action) = regrouping.agreement.poll_action() {
            // Who has decided tells the others before it can leave: only a process dies in between.
            was_early = done >= steps && regrouping.agreement.outcome().is_none();
            if was_early {
                break;
            }
            done += 1;
            match action {
                Action::Send { to, message } => regrouping.send(to, &message).unwrap(),
                Action::Settle => {
                    let me = communicator.rank() as u32;
                    regrouping.agreement.on_settled(communicator.control.fate(me as usize).settle(me) == me);
                }
            }
        }
        if let Some((from, letter)) = communicator.neighbours.receive_any(AGREEMENT_ITEM, LOOK) {
            regrouping.hear(from, letter).unwrap();
        }
    }
    if let Some(Outcome::Decided(proposal)) = regrouping.agreement.outcome().cloned() {
        let decision = regrouping.conclude(proposal).unwrap();
        let members: Vec<usize> = decision.proposal.members.iter().collect();
        drop(decision.carry_over(communicator, &members));
    }
    was_early
}

fn sum(communicator: &Communicator) -> Result<u64> {
    let mut sum = [1u64];
    communicator.all_reduce(&mut sum, ReduceOp::Sum)?;
    Ok(sum[0])
}

#[test]
fn a_rank_that_leaves_after_any_step_is_left_out_by_all() {
    for world_size in 2..=5 {
        for victim in 0..world_size {
            for steps in 0.. {
                let sizes = on_threads(world_size, |communicator| {
                    if communicator.rank() == victim {
                        return leave_after(communicator, steps).then_some(0);
                    }
                    let next = communicator.shrink().unwrap();
                    // It may have left after the decision was made: then the next generation notices.
                    let next = if sum(&next).is_ok() { next } else { next.shrink().unwrap() };
                    Some(sum(&next).unwrap())
                });
                let expected = Some(world_size as u64 - 1);
                let are_right = (0..world_size).all(|rank| rank == victim || sizes[rank] == expected);
                assert!(are_right, "{sizes:?}: rank {victim} of {world_size} left after {steps} steps");
                if sizes[victim].is_none() {
                    // A join to each of the others, an answer or a proposal to each, and settling.
                    assert!(steps > world_size, "only {steps} steps");
                    break;
                }
            }
        }
    }
}

#[test]
fn two_ranks_that_leave_after_any_steps_are_left_out_by_all() {
    for steps in 0..8 {
        for others in 0..8 {
            let sizes = on_threads(5, |communicator| match communicator.rank() {
                0 => leave_after(communicator, steps).into(),
                1 => leave_after(communicator, others).into(),
                _ => {
                    let mut next = communicator.shrink().unwrap();
                    loop {
                        match sum(&next) {
                            Ok(3) => break 3,
                            Ok(_) => panic!("a rank that left is still there"),
                            Err(_) => next = next.shrink().unwrap(),
                        }
                    }
                }
            });
            assert_eq!(sizes[2..], [3, 3, 3], "{steps} and {others} steps");
        }
    }
}

#[test]
fn a_rank_that_is_given_up_is_told_so_and_the_others_go_on() {
    let decided = Mutex::new(Vec::new());
    on_threads(4, |communicator| {
        let me = communicator.rank();
        if me == 3 {
            // As a look at a stopped process does.
            assert_eq!(communicator.control.fate(1).settle(3), 3);
        }
        match communicator.shrink() {
            Ok(next) => {
                let sum = sum(&next).unwrap();
                decided.lock().unwrap().push((me, next.world_size(), sum));
            }
            Err(error) => {
                assert_eq!(me, 1);
                assert_eq!(
                    error.to_string(),
                    "the other ranks gave up rank 1, this process, during shrink: they agreed to go on without it. It runs \
                     again, but only a new communicator can join them (or a renewed ep::Buffer, where only that left it out)."
                );
            }
        }
    });
    let mut decided = decided.into_inner().unwrap();
    decided.sort_unstable();
    assert_eq!(decided, [(0, 3, 3), (2, 3, 3), (3, 3, 3)]);
    // Nothing proves that it does not write any more.
    assert!(quarantined_bytes() >= Control::bytes(4));
}
