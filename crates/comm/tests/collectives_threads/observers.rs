//! Observers: other threads that see what a rank does, ask why, and end it.

use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use unisono::{Error, Memory, Operations, ReduceOp, Stream};

use crate::support::threads::on_threads;

#[test]
fn an_abort_frees_who_waits_within_a_second_and_tells_the_reason() {
    let (sender, observers) = mpsc::channel();
    let (sender, observers) = (Mutex::new(sender), Mutex::new(observers));
    let errors = on_threads(3, move |communicator| {
        communicator.barrier().unwrap();
        if communicator.rank() == 1 {
            let waiting: unisono::Observer = observers.lock().unwrap().recv().unwrap();
            // Until rank 0 stands in its call.
            let start = Instant::now();
            while waiting.state().current.is_none() {
                assert!(start.elapsed() < Duration::from_secs(20), "{:?}", waiting.state());
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(waiting.state().current.as_deref(), Some("all_reduce #2 on rank 0 (f64, 3, sum)"));
            assert_eq!(waiting.state().completed, 1);
            let start = Instant::now();
            communicator.observer().abort("the learning rate was wrong");
            communicator.observer().abort("a second reason");
            let error = communicator.all_reduce(&mut [0f64; 3], ReduceOp::Sum).unwrap_err();
            return (error, start);
        }
        if communicator.rank() == 0 {
            sender.lock().unwrap().send(communicator.observer()).unwrap();
        }
        let error = communicator.all_reduce(&mut [0f64; 3], ReduceOp::Sum).unwrap_err();
        let now = Instant::now();
        assert!(communicator.observer().state().failure.is_some());
        (error, now)
    });
    let aborted_at = errors[1].1;
    for (rank, (error, at)) in errors.iter().enumerate() {
        let Error::Aborted { rank: 1, reason, .. } = error else { panic!("rank {rank}: {error}") };
        assert_eq!(reason, "the learning rate was wrong");
        assert!(at.saturating_duration_since(aborted_at) < Duration::from_secs(1), "rank {rank}");
    }
}

#[test]
fn state_counts_calls_and_names_the_failure() {
    on_threads(2, |communicator| {
        let observer = communicator.observer();
        assert_eq!((observer.state().completed, observer.state().current), (0, None));
        for number in 1..=40 {
            communicator.all_reduce(&mut [1u8], ReduceOp::Sum).unwrap();
            assert_eq!(observer.state().completed, number);
            assert_eq!(observer.state().current, None);
        }
        assert_eq!(observer.state().failure, None);
        communicator.barrier().unwrap();
        if communicator.rank() == 0 {
            observer.abort("enough");
        }
        let error = communicator.barrier().unwrap_err();
        assert!(matches!(error, Error::Aborted { rank: 0, .. }), "{error}");
        let failure = observer.state().failure.unwrap();
        assert!(
            matches!(&failure, Error::Aborted { rank: 0, reason, .. } if reason == "enough"),
            "{failure}"
        );
        assert_eq!(observer.state().completed, 41);
    });
}

#[test]
fn explain_tells_the_connection_and_the_algorithm_of_the_latest_call() {
    on_threads(4, |communicator| {
        let rank = communicator.rank();
        let observer = communicator.observer();
        let mut window = communicator.window::<f32>(100_000, Memory::Host).unwrap();
        let latest = |expected: &str| {
            let text = observer.explain().to_string();
            assert!(text.contains("ranks [0, 1, 2, 3], connected by shared memory"), "{text}");
            assert!(
                text.contains(
                    "all_reduce: one-shot up to 5461 B, then two-shot; in windows direct from 16 KiB"
                ),
                "{text}"
            );
            assert!(text.contains(expected), "expected {expected}\n{text}");
        };
        communicator.all_reduce(&mut [1f32; 2], ReduceOp::Sum).unwrap();
        latest(&format!(
            "on rank {rank} (f32, 2, sum): all_reduce of 8 B per rank among 4 ranks takes one-shot"
        ));
        communicator.all_reduce(&mut vec![1f32; 100_000], ReduceOp::Sum).unwrap();
        latest(&format!(
            "on rank {rank} (f32, 100000, sum): all_reduce of 400000 B per rank among 4 ranks takes two-shot"
        ));
        communicator.all_reduce(&mut window, ReduceOp::Sum).unwrap();
        latest("takes direct, because all buffers lie in windows and it is at least 16 KiB (default)");
        communicator.all_gather(&mut [0u8; 4]).unwrap();
        latest("(u8, 1): all_gather of 1 B per rank among 4 ranks takes one-shot");
        communicator.all_to_all(&mut window).unwrap();
        latest("not direct, because input and output lie in the same window");
        communicator.destroy().unwrap();
    });
}

#[test]
fn an_observer_outlives_its_communicator() {
    let observers = on_threads(2, |communicator| {
        communicator.barrier().unwrap();
        let observer = communicator.observer();
        communicator.destroy().unwrap();
        observer
    });
    for observer in &observers {
        assert_eq!((observer.state().completed, observer.state().failure), (2, None));
    }
    for observer in observers {
        observer.abort("nobody is there any more");
        assert!(observer.explain().to_string().contains("shared memory"));
    }
}

#[test]
fn the_host_stream_runs_every_operation_at_once() {
    on_threads(2, |communicator| {
        let stream = Stream::host();
        let on_stream = communicator.on(&stream);
        let rank = communicator.rank();
        let mut sum = [rank as i64 + 1];
        on_stream.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [3]);
        let mut copy = [0i64];
        on_stream.broadcast_into(&[rank as i64 + 5], &mut copy, 1).unwrap();
        assert_eq!(copy, [6]);
        let mut all = [0u8; 2];
        on_stream.all_gather_into(&[rank as u8 + 1], &mut all).unwrap();
        assert_eq!(all, [1, 2]);
        on_stream.barrier().unwrap();
        communicator.destroy().unwrap();
    });
}
