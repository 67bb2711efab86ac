//! Ranks that leave, are late or never come: nobody waits for ever, and everybody is told who.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use unisono::{Communicator, Error, Operations, ReduceOp};

use crate::support::threads::{on_built, on_threads};

#[test]
fn a_dropped_communicator_is_an_error_for_who_still_waits() {
    let errors = on_threads(3, |communicator| {
        communicator.barrier().unwrap();
        if communicator.rank() == 1 {
            drop(communicator);
            return None;
        }
        let error = communicator.all_reduce(&mut [1u8], ReduceOp::Sum).unwrap_err();
        assert_eq!(communicator.barrier().unwrap_err(), error, "the first cause stands");
        Some(error)
    });
    let left = Error::PeerLeft { rank: 1, during: "all_reduce #2".to_owned() };
    assert_eq!(errors, [Some(left.clone()), None, Some(left.clone())]);
    assert_eq!(
        left.to_string(),
        "rank 1 left before all_reduce #2 was complete: it dropped its communicator, or shrinks it. Call destroy() on every rank to end together; the others can go on with shrink()."
    );
}

#[test]
fn a_rank_that_panics_is_one_that_left() {
    let results = on_threads(2, |communicator| {
        if communicator.rank() == 0 {
            let panics = move || -> () {
                let _mine = communicator;
                std::panic::resume_unwind(Box::new("a fault of the program"));
            };
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
            return None;
        }
        Some(communicator.barrier().unwrap_err())
    });
    assert_eq!(results[1], Some(Error::PeerLeft { rank: 0, during: "barrier #1".to_owned() }));
}

#[test]
fn whoever_drops_after_its_last_call_does_not_break_that_call_for_others() {
    for turn in 0..150 {
        on_threads(4, move |communicator| {
            let rank = communicator.rank();
            let mut large = vec![rank as u32; [10, 5000, 400_000][turn % 3] / (1 + turn / 50)];
            // Rank `turn % 4` comes late to the last calls; the others are done with them, and gone, as soon as they can.
            communicator.barrier().unwrap();
            if rank == turn % 4 {
                std::thread::sleep(Duration::from_micros(300));
            }
            match turn % 5 {
                0 => communicator.all_reduce(&mut large, ReduceOp::Max).unwrap(),
                1 => communicator.broadcast(&mut large, 3).unwrap(),
                2 => {
                    let mut all = vec![0; large.len() * 4];
                    communicator.all_gather_into(&large, &mut all).unwrap();
                    large.fill(all[all.len() - 1]);
                }
                3 => {
                    communicator.broadcast(&mut large, 3).unwrap();
                    communicator.broadcast(&mut [0u8], 0).unwrap();
                    communicator.broadcast(&mut [0u8], 1).unwrap();
                }
                _ => {
                    communicator.all_reduce(&mut large, ReduceOp::Max).unwrap();
                    communicator.barrier().unwrap();
                }
            }
            assert!(large.iter().all(|value| *value == 3), "turn {turn}");
            drop(communicator);
        });
    }
}

#[test]
fn destroy_waits_for_all_ranks() {
    let entered = Arc::new(Mutex::new(Vec::new()));
    let seen = entered.clone();
    on_threads(3, move |communicator| {
        let rank = communicator.rank();
        std::thread::sleep(Duration::from_millis(20 * rank as u64));
        seen.lock().unwrap().push(rank);
        communicator.destroy().unwrap();
        assert_eq!(seen.lock().unwrap().len(), 3, "rank {rank} was let go before all had come");
    });
    assert_eq!(entered.lock().unwrap().len(), 3);
}

#[test]
fn a_world_of_one_needs_nobody() {
    on_threads(1, |communicator| {
        let mut value = [4.0f32, f32::NEG_INFINITY];
        communicator.all_reduce(&mut value, ReduceOp::PreMulSum(0.5)).unwrap();
        assert_eq!(value, [2.0, f32::NEG_INFINITY]);
        communicator.broadcast(&mut value, 0).unwrap();
        communicator.all_gather(&mut value).unwrap();
        communicator.barrier().unwrap();
        communicator.destroy().unwrap();
    });
}

#[test]
fn a_timeout_names_the_ranks_that_did_not_come() {
    let (release, held) = mpsc::channel::<()>();
    let (release, held) = (Mutex::new(Some(release)), Mutex::new(held));
    let patience = Duration::from_millis(200);
    let results = on_built(
        3,
        move |builder| builder.timeout(Some(patience)),
        move |communicator| {
            if communicator.rank() == 2 {
                // Lives, but does not call before rank 0 has given up.
                held.lock().unwrap().recv().unwrap();
                return communicator.check().unwrap_err();
            }
            let start = Instant::now();
            let error = communicator.all_reduce(&mut [0u8; 1000], ReduceOp::Sum).unwrap_err();
            assert!(start.elapsed() >= patience, "gave up after {:?}", start.elapsed());
            assert!(start.elapsed() < patience * 20, "gave up only after {:?}", start.elapsed());
            if communicator.rank() == 0 {
                release.lock().unwrap().take().unwrap().send(()).unwrap();
            }
            error
        },
    );
    for error in results {
        let Error::Timeout { rank, call, waited_ms, missing } = &error else { panic!("{error}") };
        assert!(*rank < 2 && *waited_ms >= 200, "{error}");
        assert_eq!(call, "all_reduce #1");
        assert_eq!(missing.len(), 1, "{error}");
        assert!(missing[0].starts_with("rank 2 ("), "{error}");
    }
}

#[test]
fn a_rank_that_waits_in_destroy_gives_up_in_time_too() {
    let (release, held) = mpsc::channel::<()>();
    let (release, held) = (Mutex::new(Some(release)), Mutex::new(held));
    let results = on_built(
        2,
        |builder| builder.timeout(Some(Duration::from_millis(100))),
        move |communicator| {
            if communicator.rank() == 1 {
                held.lock().unwrap().recv().unwrap();
                return communicator.destroy().unwrap_err();
            }
            let error = communicator.destroy().unwrap_err();
            release.lock().unwrap().take().unwrap().send(()).unwrap();
            error
        },
    );
    for error in results {
        let Error::Timeout { rank: 0, call, missing, .. } = &error else { panic!("{error}") };
        assert_eq!(call, "destroy #1");
        assert!(missing.len() == 1 && missing[0].starts_with("rank 1 ("), "{error}");
    }
}

#[test]
fn ranks_that_meet_as_processes_do_are_told_of_a_drop() {
    let errors = on_built(
        3,
        |builder| builder,
        |communicator: Communicator| {
            communicator.barrier().unwrap();
            if communicator.rank() == 0 {
                drop(communicator);
                return None;
            }
            Some(communicator.broadcast(&mut [0u8], 0).unwrap_err())
        },
    );
    let left = Error::PeerLeft { rank: 0, during: "broadcast #2".to_owned() };
    assert_eq!(errors, [None, Some(left.clone()), Some(left)]);
}
