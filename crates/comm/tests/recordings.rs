//! What the flight recorder keeps, as another process would read it.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use unisono::recorder::{self, End, Presence, Process, Recording, Snapshot, Standing, WaitsOn};
use unisono::store::MemoryStore;
use unisono::{Communicator, Memory, Operations, ReduceOp};

/// A world of threads with a job name of its own, so that tests of one process do not find each other's.
fn world<R: Send + 'static>(
    job: &'static str,
    world_size: usize,
    rank: impl Fn(Communicator) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let (store, rank) = (MemoryStore::new(), Arc::new(rank));
    let threads: Vec<_> = (0..world_size)
        .map(|number| {
            let (store, rank) = (store.clone(), rank.clone());
            std::thread::spawn(move || {
                let builder = Communicator::builder().store(Arc::new(store)).job(job);
                rank(builder.rank(number).world_size(world_size).build().unwrap())
            })
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn recording(job: &str) -> Recording {
    let found = recorder::find(Some(&[std::process::id()])).unwrap();
    found.recordings.into_iter().find(|recording| recording.job() == job).expect("the job is found")
}

/// The first snapshot that is as wanted.
fn until(recording: &Recording, wanted: impl Fn(&Snapshot) -> bool) -> Snapshot {
    let start = Instant::now();
    loop {
        let snapshot = recording.snapshot().unwrap();
        if wanted(&snapshot) {
            return snapshot;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "{snapshot:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_kind_of_call_is_recorded_with_what_it_was() {
    world("kinds", 2, |rank| {
        let other = 1 - rank.rank();
        let mut window = rank.window::<f32>(8192, Memory::Host).unwrap();
        rank.all_reduce(&mut window, ReduceOp::Max).unwrap();
        rank.broadcast(&mut [0u8; 100_000], 1).unwrap();
        rank.all_reduce(&mut [0f64; 2], ReduceOp::Sum).unwrap();
        rank.send(&[7i32; 3], other, 9).unwrap();
        rank.recv(&mut [0i32; 3], other, 9).unwrap();
        rank.scope(|scope| scope.barrier()?.wait()).unwrap();
        if rank.rank() == 0 {
            let snapshot = recording("kinds").snapshot().unwrap();
            assert_eq!((snapshot.ranks.len(), snapshot.failure), (2, None));
            let view = &snapshot.ranks[0];
            assert_eq!((view.presence, view.process), (Presence::Here, Process::Running));
            assert_eq!(view.pid, std::process::id());
            let calls: Vec<String> =
                view.records.iter().map(|record| format!("{record}: {}", record.way(2))).collect();
            let expected = [
                "the start of the job: one-shot",
                "window #1 (f32, 8192): one-shot",
                "all_reduce #2 (u8, 1, min): inline",
                "all_reduce #3 (f32, 8192, max, window 1): direct",
                "broadcast #4 (u8, 100000, root 1): one-shot",
                "all_reduce #5 (f64, 2, sum): inline",
                "send to rank 1 (i32, 3, tag 9): message",
                "recv from rank 1 (i32, 3, tag 9): message",
                "barrier #6: one-shot",
            ];
            assert_eq!(calls, expected);
            assert!(view.records.iter().all(|record| !record.is_open()), "{:?}", view.records);
            let took = |at: usize| view.records[at].took();
            assert!(took(4).is_some(), "a large call is stamped at its end");
            assert!(view.records.is_sorted_by_key(|record| std::cmp::Reverse(record.begun)));
        }
        rank.barrier().unwrap();
        window.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn the_last_thousand_calls_stay() {
    world("many", 1, |rank| {
        for _ in 0..5000 {
            rank.barrier().unwrap();
        }
        let snapshot = recording("many").snapshot().unwrap();
        let records = &snapshot.ranks[0].records;
        assert_eq!(records.len(), 1024);
        let numbers: Vec<u64> = records.iter().map(|record| record.number.unwrap()).collect();
        assert_eq!(numbers, (3977..=5000).collect::<Vec<_>>());
        assert!(records.iter().all(|record| record.end == End::AtOnce));
    });
}

#[test]
fn whoever_waits_says_for_whom_and_a_failure_is_told_with_its_call() {
    let gate = Arc::new(Barrier::new(2));
    world("waits", 3, move |rank| {
        rank.barrier().unwrap();
        if rank.rank() == 1 {
            let recording = recording("waits");
            let is_waiting = |rank: &recorder::RankView| matches!(rank.standing(), Standing::Waiting(_));
            let snapshot = until(&recording, |snapshot| {
                is_waiting(&snapshot.ranks[0]) && is_waiting(&snapshot.ranks[2])
            });
            assert_eq!((snapshot.waits_for(0), snapshot.waits_for(2)), (vec![1], vec![1]));
            let Standing::Waiting(call) = snapshot.ranks[0].standing() else { unreachable!() };
            assert_eq!(call.to_string(), "all_reduce #2 (i32, 1, sum)");
            assert_eq!(call.waits.unwrap().on, WaitsOn::Arrival);
            assert!(recorder::why(&snapshot).starts_with("Ranks 0 and 2 have waited in all_reduce #2"));
            rank.all_reduce(&mut [1i32], ReduceOp::Sum).unwrap();
            let snapshot = until(&recording, |snapshot| {
                snapshot.ranks[0].records.iter().all(|record| record.waits.is_none())
                    && is_waiting(&snapshot.ranks[0])
                    || matches!(snapshot.ranks[0].standing(), Standing::Waiting(call) if call.number.is_none())
            });
            assert_eq!(snapshot.waits_for(0), [2]);
            assert!(
                recorder::why(&snapshot)
                    .starts_with("Rank 0 has waited in recv from rank 2 (u8, 1, tag 5) for"),
                "{}",
                recorder::why(&snapshot)
            );
            rank.observer().abort("that is enough");
            let snapshot =
                until(&recording, |snapshot| matches!(snapshot.ranks[0].standing(), Standing::Failed(_)));
            let failure = snapshot.failure.clone().unwrap();
            assert_eq!(failure.found_by, 1);
            assert!(failure.sentence.contains("that is enough"), "{failure:?}");
            let text = recorder::why(&snapshot);
            assert!(text.contains("has failed in recv from rank 2 (u8, 1, tag 5)"), "{text}");
            return;
        }
        rank.all_reduce(&mut [1i32], ReduceOp::Sum).unwrap();
        if rank.rank() == 0 {
            rank.recv(&mut [0u8], 2, 5).unwrap_err();
        }
        gate.wait();
    });
}

#[test]
fn a_recording_outlives_the_job_and_tells_how_each_rank_left() {
    let recordings = world("ends", 2, |rank| {
        rank.barrier().unwrap();
        let recording = recording("ends");
        rank.barrier().unwrap();
        match rank.rank() {
            0 => drop(rank),
            _ => rank.destroy().map_or((), |()| unreachable!("rank 0 does not come")),
        }
        recording
    });
    let snapshot = recordings[0].snapshot().unwrap();
    let left: Vec<Presence> = snapshot.ranks.iter().map(|rank| rank.presence).collect();
    assert_eq!(left, [Presence::Dropped, Presence::Dropped]);
    assert!(!snapshot.is_live());
    assert!(matches!(snapshot.ranks[1].standing(), Standing::Failed(_)));
    assert!(snapshot.failure.unwrap().sentence.starts_with("rank 0 left before "));
}

#[test]
fn without_the_recorder_there_are_ranks_but_no_calls() {
    let rank = Communicator::builder()
        .store(Arc::new(MemoryStore::new()))
        .job("off")
        .rank(0)
        .world_size(1)
        .recorder(false)
        .build()
        .unwrap();
    rank.barrier().unwrap();
    let snapshot = recording("off").snapshot().unwrap();
    assert_eq!((snapshot.ranks[0].is_recording, snapshot.ranks[0].records.len()), (false, 0));
    assert!(recorder::why(&snapshot).contains("UNISONO_RECORDER=off"));
}
