//! Ranks that leave, or are silent: named where nothing is masked, left out alike on all survivors where it is.

use std::time::{Duration, Instant};

use unisono::ep::{
    Buffer, CachedDispatch, Combine, Dispatch, LowLatencyCombine, LowLatencyDispatch, Settings,
};
use unisono::half::bf16;
use unisono::{Communicator, Error, Operations, Result};

use super::support::threads::{on_built, on_threads};

const HIDDEN: usize = 32;

fn buffer(rank: &Communicator, settings: Settings) -> Buffer {
    let mut buffer = Buffer::new(rank, settings).unwrap();
    buffer.exchange(rank).unwrap();
    buffer
}

fn settings(ranks: usize, masking: bool, deadline: Duration) -> Settings {
    Settings { capacity: 4, masking, deadline, low_latency: true, ..Settings::new(HIDDEN, ranks) }
}

/// A token for each rank's expert; what combine gives back, and the rows that came.
fn step(buffer: &mut Buffer, ranks: usize) -> Result<(f32, usize)> {
    let x = vec![bf16::ONE; HIDDEN];
    let all: Vec<i64> = (0..ranks as i64).collect();
    let sent = buffer.dispatch(&Dispatch::new(&x).top_k(&all, ranks))?;
    let combined = buffer.combine(&Combine::new(&sent.x, &sent.handle))?;
    Ok((combined.x.as_slice::<bf16>()?[HIDDEN - 1].to_f32(), sent.handle.rows()))
}

/// The same in low-latency mode.
fn quick_step(buffer: &mut Buffer, ranks: usize) -> Result<(f32, usize)> {
    let x = vec![bf16::ONE; HIDDEN];
    let all: Vec<i64> = (0..ranks as i64).collect();
    let sent = buffer.low_latency_dispatch(&LowLatencyDispatch::new(&x, &all, ranks))?;
    let weights = vec![0.5f32; ranks];
    let combined =
        buffer.low_latency_combine(&LowLatencyCombine::new(&sent.x, &all, &weights, &sent.handle))?;
    Ok((combined.x.as_slice::<bf16>()?[0].to_f32(), sent.counts.as_slice::<i32>()?[0] as usize))
}

#[test]
fn a_rank_that_leaves_is_named() {
    on_threads(3, |rank| {
        let mut buffer = buffer(&rank, settings(3, false, Duration::from_secs(10)));
        assert_eq!(step(&mut buffer, 3).unwrap(), (3.0, 3));
        rank.barrier().unwrap();
        if rank.rank() == 1 {
            return;
        }
        let error = quick_step(&mut buffer, 3).unwrap_err();
        assert!(matches!(error, Error::PeerLeft { rank: 1, .. }), "{error}");
        assert_eq!(step(&mut buffer, 3).unwrap_err(), error);
    });
}

#[test]
fn a_silent_rank_is_named_after_the_deadline() {
    let start = Instant::now();
    on_threads(3, move |rank| {
        let mut buffer = buffer(&rank, settings(3, false, Duration::from_millis(200)));
        assert_eq!(step(&mut buffer, 3).unwrap(), (3.0, 3));
        if rank.rank() == 2 {
            std::thread::sleep(Duration::from_millis(800));
            assert!(matches!(step(&mut buffer, 3), Err(Error::Timeout { .. })));
            return;
        }
        let error = step(&mut buffer, 3).unwrap_err();
        let Error::Timeout { call, missing, .. } = &error else { panic!("{error}") };
        assert_eq!(call, "dispatch #3 of an ep::Buffer (ep::Settings::deadline 200ms)");
        assert!(missing.len() == 1 && missing[0].starts_with("rank 2 "), "{missing:?}");
        assert!(error.to_string().contains("rank 2"), "{error}");
    });
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn ranks_that_leave_are_masked_alike_and_the_others_go_on() {
    on_threads(5, |rank| {
        let mut buffer = buffer(&rank, settings(5, true, Duration::from_secs(30)));
        let me = rank.rank();
        assert_eq!(step(&mut buffer, 5).unwrap(), (5.0, 5));
        if me == 3 {
            // In the middle of a step: after its first call.
            let x = vec![bf16::ONE; HIDDEN];
            buffer.dispatch(&Dispatch::new(&x).top_k(&[0i64, 1, 2, 3, 4], 5)).unwrap();
            return;
        }
        // It took part in the dispatch, and in no combine.
        assert_eq!(step(&mut buffer, 5).unwrap(), (4.0, 5));
        assert_eq!(buffer.masked(), [3]);
        assert_eq!(quick_step(&mut buffer, 5).unwrap(), (2.0, 4));
        if me == 0 {
            return;
        }
        let start = Instant::now();
        assert_eq!(quick_step(&mut buffer, 5).unwrap(), (1.5, 3));
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        for _ in 0..10 {
            assert_eq!(step(&mut buffer, 5).unwrap(), (3.0, 3));
            assert_eq!(quick_step(&mut buffer, 5).unwrap(), (1.5, 3));
        }
        assert_eq!(buffer.masked(), [0, 3]);
        assert!(buffer.is_available());
    });
}

#[test]
fn a_silent_rank_is_masked_and_told_so() {
    on_built(
        3,
        |builder| builder,
        |rank| {
            let mut buffer = buffer(&rank, settings(3, true, Duration::from_millis(150)));
            assert_eq!(quick_step(&mut buffer, 3).unwrap(), (1.5, 3));
            if rank.rank() == 1 {
                std::thread::sleep(Duration::from_millis(700));
                let error = quick_step(&mut buffer, 3).unwrap_err();
                assert!(matches!(error, Error::GivenUp { rank: 1, .. }), "{error}");
            } else {
                for _ in 0..5 {
                    assert_eq!(quick_step(&mut buffer, 3).unwrap(), (1.0, 2));
                    assert_eq!(buffer.masked(), [1]);
                }
            }
            // The communicator has not failed.
            rank.barrier().unwrap();
            rank.destroy().unwrap();
        },
    );
}

#[test]
fn a_rank_is_masked_by_who_knows_better() {
    on_threads(3, |rank| {
        let mut buffer = buffer(&rank, settings(3, true, Duration::from_secs(30)));
        assert_eq!(step(&mut buffer, 3).unwrap(), (3.0, 3));
        rank.barrier().unwrap();
        if rank.rank() == 0 {
            for wrong in [0, 3] {
                assert!(matches!(buffer.mask_rank(wrong), Err(Error::Argument { what: "rank", .. })));
            }
            buffer.mask_rank(2).unwrap();
        }
        rank.barrier().unwrap();
        match step(&mut buffer, 3) {
            Ok(came) => assert_eq!((came, buffer.masked(), rank.rank() < 2), ((2.0, 2), vec![2], true)),
            Err(error) => assert!(matches!(error, Error::GivenUp { rank: 2, .. }), "{error}"),
        }
        // Cached calls keep their shape.
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
}

/// A new buffer in place of `before`.
fn renewed(before: Buffer, rank: &Communicator) -> Buffer {
    let renewed = before.renew(rank).unwrap();
    assert!(before.masked() == [1] && renewed.masked().is_empty() && renewed.is_available());
    before.close(rank).unwrap();
    renewed
}

#[test]
fn a_silent_rank_that_lives_is_taken_in_again() {
    on_threads(3, |rank| {
        let mut buffer = buffer(&rank, settings(3, true, Duration::from_millis(150)));
        assert_eq!(quick_step(&mut buffer, 3).unwrap(), (1.5, 3));
        // More than once.
        for _ in 0..3 {
            if rank.rank() == 1 {
                std::thread::sleep(Duration::from_millis(400));
                let error = quick_step(&mut buffer, 3).unwrap_err();
                assert!(matches!(error, Error::GivenUp { rank: 1, .. }), "{error}");
            } else {
                // It met all before, and so has no longer time in its first call.
                let start = Instant::now();
                assert_eq!(quick_step(&mut buffer, 3).unwrap(), (1.0, 2));
                assert!(start.elapsed() < Duration::from_millis(1200), "{:?}", start.elapsed());
            }
            buffer = renewed(buffer, &rank);
        }
        for _ in 0..5 {
            assert_eq!(quick_step(&mut buffer, 3).unwrap(), (1.5, 3));
            assert_eq!(step(&mut buffer, 3).unwrap(), (3.0, 3));
        }
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_rank_that_was_masked_on_request_is_taken_in_before_it_knew() {
    on_threads(3, |rank| {
        let mut buffer = buffer(&rank, settings(3, true, Duration::from_secs(30)));
        rank.barrier().unwrap();
        if rank.rank() != 1 {
            buffer.mask_rank(1).unwrap();
            assert_eq!(step(&mut buffer, 3).unwrap(), (2.0, 2));
        }
        rank.barrier().unwrap();
        let mut buffer = renewed(buffer, &rank);
        assert_eq!(step(&mut buffer, 3).unwrap(), (3.0, 3));
        rank.destroy().unwrap();
    });
}

#[test]
fn a_rank_that_left_is_not_taken_in_and_the_others_go_on_without_it() {
    on_threads(3, |rank| {
        let mut buffer = buffer(&rank, settings(3, true, Duration::from_secs(30)));
        assert_eq!(step(&mut buffer, 3).unwrap(), (3.0, 3));
        if rank.rank() == 1 {
            return;
        }
        assert_eq!(step(&mut buffer, 3).unwrap(), (2.0, 2));
        for _ in 0..2 {
            let start = Instant::now();
            let error = buffer.renew(&rank).unwrap_err();
            assert!(matches!(error, Error::PeerLeft { rank: 1, .. }), "{error}");
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            assert_eq!((step(&mut buffer, 3).unwrap(), buffer.masked()), ((2.0, 2), vec![1]));
        }
    });
}

#[test]
fn a_cached_dispatch_keeps_its_shape_when_a_source_is_gone() {
    on_threads(3, |rank| {
        let mut buffer = buffer(&rank, settings(3, true, Duration::from_secs(30)));
        let x = vec![bf16::ONE; HIDDEN];
        let sent = buffer.dispatch(&Dispatch::new(&x).top_k(&[0i64, 1, 2], 3)).unwrap();
        if rank.rank() == 1 {
            return;
        }
        let (again, _) = buffer.dispatch_cached(&CachedDispatch::new(&x, &sent.handle)).unwrap();
        let expected: Vec<bf16> =
            (0..3 * HIDDEN).map(|at| if at / HIDDEN == 1 { bf16::ZERO } else { bf16::ONE }).collect();
        assert_eq!(again.as_slice::<bf16>().unwrap(), expected);
    });
}

#[test]
fn an_abort_ends_every_wait() {
    for masking in [false, true] {
        on_threads(2, move |rank| {
            let mut buffer = buffer(&rank, settings(2, masking, Duration::from_secs(60)));
            if rank.rank() == 0 {
                std::thread::sleep(Duration::from_millis(50));
                rank.observer().abort("enough");
                return;
            }
            let error = step(&mut buffer, 2).unwrap_err();
            assert!(matches!(error, Error::Aborted { rank: 0, .. }), "{error}");
        });
    }
}
