//! The flight recorder of GPUs: what kernels did, eager and replayed, and what they are in while they hang.

use std::time::{Duration, Instant};

use unisono::cuda::DeviceBuffer;
use unisono::recorder::{self, GpuCall, Reading};
use unisono::{BufMut, DType, Operations, ReduceOp};

use crate::world::{World, devices};

/// A world of two ranks with sums and maxima of i32 loaded, and a buffer of 4 MiB for each.
fn pair() -> Option<(World, Vec<DeviceBuffer>)> {
    let devices = devices();
    if devices.is_empty() {
        return None;
    }
    let world = World::new(2, &devices, |builder| {
        let builder = builder.prepare(DType::I32, ReduceOp::Sum).unwrap();
        builder.prepare(DType::I32, ReduceOp::Max).unwrap()
    });
    let buffers = world.devices.iter().map(|device| DeviceBuffer::new(device, 4 << 20).unwrap()).collect();
    Some((world, buffers))
}

/// The first elements of a buffer.
fn some(world: &World, rank: usize, buffer: &DeviceBuffer, count: usize) -> BufMut<'static, i32> {
    // SAFETY: tests wait for their streams before a buffer goes, and it is long enough.
    unsafe { BufMut::cuda(buffer.address(), count, world.devices[rank].ordinal()) }
}

fn texts(calls: &[GpuCall]) -> Vec<String> {
    calls.iter().map(ToString::to_string).collect()
}

#[test]
fn eager_and_replayed_calls_are_told_in_order_with_kinds_and_sizes() {
    let Some((world, buffers)) = pair() else { return };
    let mut graphs = Vec::new();
    for (rank, buffer) in buffers.iter().enumerate() {
        let (on, raw) = (world.ranks[rank].on(&world.streams[rank]), &world.raw_streams[rank]);
        raw.begin_capture().unwrap();
        on.all_reduce(some(&world, rank, buffer, 7), ReduceOp::Max).unwrap();
        on.barrier().unwrap();
        graphs.push(raw.end_capture().unwrap());
        on.all_reduce(some(&world, rank, buffer, 1000), ReduceOp::Sum).unwrap();
        on.broadcast(some(&world, rank, buffer, 1 << 20), 1).unwrap();
    }
    let replay = |times: usize| {
        for _ in 0..times {
            (0..2).for_each(|rank| graphs[rank].launch(&world.raw_streams[rank]).unwrap());
        }
        world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    };
    replay(2);
    // Each rank reads its own recorder and that of its peer.
    for (reader, rank) in [(0, 0), (0, 1), (1, 0)] {
        let calls = world.ranks[reader].observer().gpu_calls(rank).unwrap();
        let expected = [
            "all_reduce #1 (i32, 1000, sum)",
            "broadcast #2 (i32, 1048576, root 1)",
            "all_reduce #3 (i32, 7, max)",
            "barrier #4",
            "all_reduce #5 (i32, 7, max)",
            "barrier #6",
        ];
        assert_eq!(texts(&calls), expected);
        let sizes: Vec<u64> = calls.iter().map(GpuCall::bytes).collect();
        assert_eq!(sizes, [4000, 4 << 20, 28, 0, 28, 0]);
        assert_eq!((calls[0].way(), calls[3].way()), ("one-shot", "headers"));
        for (at, call) in calls.iter().enumerate() {
            let (met, ended) = (call.met.expect("all came"), call.ended.expect("it is done"));
            assert!(call.begun >= met && met >= ended, "{call:?}");
            assert!(call.begun < Duration::from_secs(60), "{call:?}");
            assert!(at == 0 || calls[at - 1].ended >= Some(call.begun), "{calls:?}");
        }
        println!("rank {rank}: {:?}", calls.iter().map(GpuCall::took).collect::<Vec<_>>());
    }
    // Who looks from outside sees the same.
    let found = recorder::find(Some(&[std::process::id()])).unwrap();
    let snapshots = found.recordings.iter().map(|recording| recording.snapshot().unwrap());
    let mut views = snapshots.flat_map(|snapshot| snapshot.ranks).filter_map(|rank| rank.gpu);
    let is_ours = |view: &recorder::GpuView| {
        view.reading == Reading::Now
            && texts(&view.calls).first().is_some_and(|text| text.contains("1000, sum"))
    };
    assert!(views.any(|view| is_ours(&view) && view.calls.len() == 6));
    // The ring keeps the last 1,024.
    replay(600);
    let calls = world.ranks[0].observer().gpu_calls(0).unwrap();
    let numbers: Vec<u32> = calls.iter().map(|call| call.number).collect();
    assert_eq!(numbers, (1206 - 1023..=1206).collect::<Vec<u32>>());
    assert!(calls.iter().all(|call| !call.is_open()));
    drop(graphs);
    world.end();
    // And keeps them for who held the memory when the communicator is gone.
    let is_kept = |recording: &recorder::Recording| {
        let ranks = recording.glance().unwrap().ranks;
        let mut views = ranks.iter().filter_map(|rank| rank.gpu.as_ref());
        views.any(|view| {
            view.reading == Reading::Last && view.calls.last().is_some_and(|call| call.number == 1206)
        })
    };
    let start = Instant::now();
    while !found.recordings.iter().any(is_kept) {
        assert!(start.elapsed() < Duration::from_secs(10), "the last calls are lost");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_call_that_hangs_is_told_while_it_hangs_and_after_it_was_aborted() {
    // Small, and with a kernel that fills the device.
    for count in [10, 1 << 20] {
        let Some((world, buffers)) = pair() else { return };
        for rank in 0..2 {
            world.ranks[rank].on(&world.streams[rank]).barrier().unwrap();
        }
        world.ranks[0]
            .on(&world.streams[0])
            .all_reduce(some(&world, 0, &buffers[0], count), ReduceOp::Sum)
            .unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let start = Instant::now();
        let observer = world.ranks[1].observer();
        let (hanging, peers) = (observer.gpu_calls(0).unwrap(), observer.gpu_calls(1).unwrap());
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        let expected = format!("all_reduce #2 (i32, {count}, sum)");
        assert_eq!(texts(&hanging), ["barrier #1".to_owned(), expected.clone()]);
        assert!(hanging[1].is_open() && hanging[1].met.is_none(), "{:?}", hanging[1]);
        let since = hanging[1].begun;
        assert!((Duration::from_millis(600)..Duration::from_secs(5)).contains(&since), "{since:?}");
        assert_eq!(texts(&peers), ["barrier #1"]);
        let found = recorder::find(Some(&[std::process::id()])).unwrap();
        let all = found.recordings.iter().map(|recording| recorder::why(&recording.snapshot().unwrap()));
        let all: Vec<String> = all.collect();
        let inside = format!("The GPU of rank 0 has been in {expected} for ");
        let tells = |text: &String| {
            text.contains(&inside)
                && text.contains("The GPU of rank 1 has not begun it: its last call was barrier #1, done ")
        };
        assert!(all.iter().any(tells), "{all:?}");
        observer.abort("enough");
        world.raw_streams[0].synchronize().unwrap();
        // What was done last is kept.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(texts(&observer.gpu_calls(0).unwrap()), ["barrier #1".to_owned(), expected]);
    }
}

#[test]
fn who_is_not_there_or_has_no_gpu_is_refused() {
    let Some((world, _)) = pair() else { return };
    let error = world.ranks[0].observer().gpu_calls(2).unwrap_err().to_string();
    assert_eq!(error, "rank 2 cannot work on its GPU: there is no such rank");
    world.end();
}
