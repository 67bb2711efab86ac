//! What surrounds the data: graphs, streams, calls that differ, ranks that do not come, aborts, buffers of the wrong place.

use std::time::{Duration, Instant};

use unisono::cuda::{DeviceBuffer, Graph};
use unisono::{Buf, BufMut, Builder, DType, Error, Form, Operations, ReduceOp, Stream, recorder};

use crate::world::{World, devices};

/// A world of two ranks, on two devices where there are two.
fn pair(configure: impl FnOnce(Builder) -> Builder) -> Option<World> {
    let devices = devices();
    (!devices.is_empty()).then(|| World::new(2, &devices, configure))
}

/// With the kernels that tests capture, or call while others wait.
fn prepared(builder: Builder) -> Builder {
    [ReduceOp::Max, ReduceOp::Sum]
        .into_iter()
        .fold(builder, |builder, op| builder.prepare(DType::I32, op).unwrap())
}

fn memory(world: &World, rank: usize, values: &[i32]) -> DeviceBuffer {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut buffer = DeviceBuffer::new(&world.devices[rank], bytes.len()).unwrap();
    buffer.write(0, &bytes).unwrap();
    buffer
}

fn values(buffer: &DeviceBuffer) -> Vec<i32> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.read(0, &mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(|value| i32::from_le_bytes(*value)).collect()
}

/// All elements of a buffer, as input and output.
fn all(world: &World, rank: usize, buffer: &DeviceBuffer) -> BufMut<'static, i32> {
    // SAFETY: tests wait for their streams before a buffer goes.
    unsafe { BufMut::cuda(buffer.address(), buffer.bytes() / 4, world.devices[rank].ordinal()) }
}

fn wait(world: &World) {
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
}

/// A graph of a few calls on `buffer` of `rank`.
fn captured(world: &World, rank: usize, buffer: &DeviceBuffer, calls: usize) -> Graph {
    let stream = &world.raw_streams[rank];
    stream.begin_capture().unwrap();
    for _ in 0..calls {
        world.ranks[rank]
            .on(&world.streams[rank])
            .all_reduce(all(world, rank, buffer), ReduceOp::Max)
            .unwrap();
    }
    stream.end_capture().unwrap()
}

#[test]
fn graphs_are_replayed_between_each_other_and_between_eager_calls() {
    let Some(world) = pair(prepared) else {
        return;
    };
    let small: Vec<_> = (0..2).map(|rank| memory(&world, rank, &[rank as i32; 10])).collect();
    let large: Vec<_> = (0..2).map(|rank| memory(&world, rank, &vec![7 - rank as i32; 100_000])).collect();
    let sums: Vec<_> = (0..2).map(|rank| memory(&world, rank, &[1; 3])).collect();
    let graphs: Vec<_> = (0..2)
        .map(|rank| (captured(&world, rank, &small[rank], 5), captured(&world, rank, &large[rank], 2)))
        .collect();
    for round in 0..20 {
        for rank in 0..2 {
            let stream = &world.raw_streams[rank];
            graphs[rank].0.launch(stream).unwrap();
            if round < 10 {
                world.ranks[rank]
                    .on(&world.streams[rank])
                    .all_reduce(all(&world, rank, &sums[rank]), ReduceOp::Sum)
                    .unwrap();
            }
            graphs[rank].1.launch(stream).unwrap();
        }
    }
    wait(&world);
    for rank in 0..2 {
        world.ranks[rank].check().unwrap();
        assert_eq!(values(&small[rank]), [1; 10]);
        assert_eq!(values(&large[rank]), [7; 100_000]);
        assert_eq!(values(&sums[rank]), [1024; 3]);
    }
    drop(graphs);
    world.end();
}

#[test]
fn streams_take_turns_and_several_communicators_do_not_mind_each_other() {
    let Some(world) = pair(prepared) else { return };
    let Some(other) = pair(prepared) else { return };
    let sums: Vec<_> = (0..2).map(|rank| memory(&world, rank, &[1; 5])).collect();
    let others: Vec<_> = (0..2).map(|rank| memory(&world, rank, &[1; 70_000])).collect();
    for _ in 0..10 {
        for rank in 0..2 {
            let call = |world: &World, stream: &Stream, buffer: &DeviceBuffer| {
                world.ranks[rank].on(stream).all_reduce(all(world, rank, buffer), ReduceOp::Sum).unwrap();
            };
            // One communicator on two streams: its calls keep their order.
            call(&world, &world.streams[rank], &sums[rank]);
            call(&world, &other.streams[rank], &sums[rank]);
            call(&other, &other.streams[rank], &others[rank]);
        }
    }
    wait(&world);
    wait(&other);
    for rank in 0..2 {
        assert_eq!(values(&sums[rank]), [1 << 20; 5]);
        assert_eq!(values(&others[rank]), [1 << 10; 70_000]);
        world.ranks[rank].check().unwrap();
        other.ranks[rank].check().unwrap();
    }
    world.end();
    other.end();
}

/// Large calls of four communicators, which each rank begins in another order: there is room for the blocks of all. Ranks that share
/// a device have no such promise, because their own calls need room as well.
#[test]
fn communicators_with_large_calls_are_begun_in_any_order() {
    let ordinals = devices();
    if ordinals.len() < 2 {
        eprintln!("SKIPPED: one device");
        return;
    }
    for form in [Form::Bulk, Form::Ring] {
        let worlds: Vec<World> = (0..4)
            .map(|_| {
                World::new(ordinals.len(), &ordinals, |builder| {
                    builder.gpu_algorithm(form, 0).prepare(DType::F32, ReduceOp::Max).unwrap()
                })
            })
            .collect();
        let count = 4 << 20;
        let buffers: Vec<Vec<DeviceBuffer>> = worlds
            .iter()
            .map(|world| (0..ordinals.len()).map(|rank| floats(world, rank, count)).collect())
            .collect();
        for round in 0..5 {
            for (rank, ordinal) in ordinals.iter().enumerate() {
                for turn in 0..worlds.len() {
                    // Another one begins on each rank and in each round, and every other rank goes backwards.
                    let turn = if rank % 2 == 0 { turn } else { worlds.len() - 1 - turn };
                    let at = (turn + rank / 2 + round) % worlds.len();
                    let (world, buffer) = (&worlds[at], &buffers[at][rank]);
                    // SAFETY: the buffers live until the streams were waited for, and only their streams touch them.
                    let x = unsafe { BufMut::<f32>::cuda(buffer.address(), count, *ordinal) };
                    world.ranks[rank].on(&world.streams[rank]).all_reduce(x, ReduceOp::Max).unwrap();
                }
            }
        }
        for (world, buffers) in worlds.iter().zip(&buffers) {
            wait(world);
            for (rank, buffer) in buffers.iter().enumerate() {
                world.ranks[rank].check().unwrap();
                let mut bytes = vec![0; count * 4];
                buffer.read(0, &mut bytes).unwrap();
                let most = ordinals.len() as f32;
                assert!(bytes.as_chunks().0.iter().all(|value| f32::from_le_bytes(*value) == most));
            }
        }
        worlds.into_iter().for_each(World::end);
    }
}

/// `count` times the rank's number from 1.
fn floats(world: &World, rank: usize, count: usize) -> DeviceBuffer {
    let mut buffer = DeviceBuffer::new(&world.devices[rank], count * 4).unwrap();
    buffer.write(0, &(rank as f32 + 1.0).to_le_bytes().repeat(count)).unwrap();
    buffer
}

#[test]
fn two_launches_at_once_of_one_communicator_are_found() {
    let Some(world) = pair(prepared) else {
        return;
    };
    let buffers = [memory(&world, 0, &[1; 10]), memory(&world, 0, &[1; 10])];
    let graphs = buffers.each_ref().map(|buffer| captured(&world, 0, buffer, 1));
    let second = unisono::cuda::Stream::new(&world.devices[0]).unwrap();
    // Rank 1 does not come, so the first launch still runs when the second begins.
    graphs[0].launch(&world.raw_streams[0]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    graphs[1].launch(&second).unwrap();
    second.synchronize().unwrap();
    world.raw_streams[0].synchronize().unwrap();
    assert_eq!(world.ranks[0].check().unwrap_err(), Error::ConcurrentUse { rank: 0 });
    assert!(matches!(world.ranks[1].check(), Err(Error::Aborted { rank: 0, .. })));
}

#[test]
fn calls_that_differ_are_named_on_both_ranks() {
    let Some(world) = pair(prepared) else { return };
    let buffers: Vec<_> = (0..2).map(|rank| memory(&world, rank, &[1; 64])).collect();
    world.ranks[0].on(&world.streams[0]).all_reduce(all(&world, 0, &buffers[0]), ReduceOp::Sum).unwrap();
    world.ranks[1].on(&world.streams[1]).broadcast(all(&world, 1, &buffers[1]), 1).unwrap();
    wait(&world);
    for rank in &world.ranks {
        let Err(Error::Mismatch { left, right }) = rank.check() else { panic!("{:?}", rank.check()) };
        let mut both = [left, right];
        both.sort();
        assert_eq!(
            both,
            ["all_reduce #1 on rank 0 (i32, 64, sum)", "broadcast #1 on rank 1 (i32, 64, root 1)"]
        );
    }
    // What comes later fails at once, with the same cause.
    let again = world.ranks[0].on(&world.streams[0]).barrier();
    assert!(matches!(again, Err(Error::Mismatch { .. })), "{again:?}");
}

#[test]
fn parts_that_differ_are_named_on_both_ranks() {
    for [ours, theirs] in [[[30, 34], [34, 30]], [[64, 0], [0, 64]], [[32, 32], [32, 31]]] {
        for is_sum in [false, true] {
            let Some(world) = pair(prepared) else { return };
            let buffers: Vec<_> = (0..4).map(|at| memory(&world, at / 2, &[1; 64])).collect();
            for (rank, counts) in [ours, theirs].iter().enumerate() {
                let (input, output) = (&buffers[2 * rank], &buffers[2 * rank + 1]);
                let (one, all) = (counts[rank], counts.iter().sum());
                let (inputs, outputs) = if is_sum { (all, one) } else { (one, all) };
                let ordinal = world.devices[rank].ordinal();
                // SAFETY: the streams are waited for before a buffer goes, and both are long enough.
                let (input, output) = unsafe {
                    (
                        Buf::<i32>::cuda(input.address(), inputs, ordinal),
                        BufMut::<i32>::cuda(output.address(), outputs, ordinal),
                    )
                };
                let on = world.ranks[rank].on(&world.streams[rank]);
                match is_sum {
                    true => on.reduce_scatter_v(input, output, counts, ReduceOp::Sum).unwrap(),
                    false => on.all_gather_v(input, output, counts).unwrap(),
                }
            }
            wait(&world);
            for rank in &world.ranks {
                let Err(Error::Mismatch { left, right }) = rank.check() else { panic!("{:?}", rank.check()) };
                let mut both = [left, right];
                both.sort();
                let name = if is_sum { "reduce_scatter_v" } else { "all_gather_v" };
                for (rank, text) in both.iter().enumerate() {
                    assert!(text.starts_with(&format!("{name} #1 on rank {rank} (i32, 6")), "{both:?}");
                    assert!(text.contains(" in parts #"), "{both:?}");
                }
            }
        }
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_when_patience_ends() {
    // As packets, in lines, and in tiles.
    for count in [10, 150_000, 3_000_000] {
        let limited = |builder: Builder| builder.timeout(Some(Duration::from_millis(2500)));
        let Some(world) = pair(limited) else { return };
        let buffer = memory(&world, 0, &vec![1; count]);
        let call = || world.ranks[0].on(&world.streams[0]).all_reduce(all(&world, 0, &buffer), ReduceOp::Sum);
        call().unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        let current = world.ranks[0].observer().state().current.unwrap();
        assert!(current.starts_with("call #1 on the GPU of rank 0, waiting for rank 1"), "{current}");
        // And to who looks from outside. Other worlds of this program may wait as well.
        let found = recorder::find(Some(&[std::process::id()])).unwrap();
        let texts: Vec<String> =
            found.recordings.iter().map(|recording| recorder::why(&recording.snapshot().unwrap())).collect();
        let inside = format!("The GPU of rank 0 has been in all_reduce #1 (i32, {count}, sum) for ");
        let before =
            "The GPU of rank 1 has not begun it, nor any call before; its process has not called it.";
        assert!(texts.iter().any(|text| text.contains(&inside) && text.contains(before)), "{texts:?}");
        world.raw_streams[0].synchronize().unwrap();
        // The call after it is refused with the same cause.
        for error in [world.ranks[0].check().unwrap_err(), call().unwrap_err()] {
            let Error::Timeout { rank: 0, call, waited_ms, missing } = &error else { panic!("{error}") };
            assert!(
                (2500..9000).contains(waited_ms) && missing.len() == 1 && missing[0].starts_with("rank 1"),
                "{error}"
            );
            assert_eq!(call, "call #1 on its GPU");
        }
    }
}

#[test]
fn an_abort_ends_kernels_that_wait_and_leaves_the_device_in_order() {
    // As packets, in lines, and in tiles.
    for count in [10, 150_000, 3_000_000] {
        let Some(world) = pair(|builder| builder) else { return };
        let buffer = memory(&world, 0, &vec![1; count]);
        let call = || world.ranks[0].on(&world.streams[0]).all_reduce(all(&world, 0, &buffer), ReduceOp::Sum);
        call().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        world.ranks[1].observer().abort("enough");
        let start = Instant::now();
        world.raw_streams[0].synchronize().unwrap();
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        for error in [world.ranks[0].check().unwrap_err(), call().unwrap_err()] {
            assert!(
                matches!(&error, Error::Aborted { rank: 1, reason, .. } if reason == "enough"),
                "{error}"
            );
        }
    }
    // The same devices serve another world at once.
    let Some(next) = pair(|builder| builder) else { return };
    next.barrier();
    next.end();
}

#[test]
fn a_rank_that_leaves_is_named_where_kernels_wait_for_it() {
    // As packets, in lines, and in tiles.
    for count in [10, 150_000, 3_000_000] {
        let Some(mut world) = pair(|builder| builder) else { return };
        let buffer = memory(&world, 0, &vec![1; count]);
        world.ranks[0].on(&world.streams[0]).all_reduce(all(&world, 0, &buffer), ReduceOp::Sum).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        drop(world.ranks.pop());
        world.raw_streams[0].synchronize().unwrap();
        let call = || world.ranks[0].on(&world.streams[0]).all_reduce(all(&world, 0, &buffer), ReduceOp::Sum);
        for error in [world.ranks[0].check().unwrap_err(), call().unwrap_err()] {
            assert!(matches!(error, Error::PeerLeft { rank: 1, .. }), "{error}");
        }
    }
}

#[test]
fn kernels_that_are_not_loaded_cannot_be_captured_and_nothing_is() {
    let Some(world) = pair(|builder| builder) else { return };
    let buffer = memory(&world, 0, &[1; 10]);
    let stream = &world.raw_streams[0];
    stream.begin_capture().unwrap();
    let error = world.ranks[0]
        .on(&world.streams[0])
        .all_reduce(all(&world, 0, &buffer), ReduceOp::BitXor)
        .unwrap_err();
    assert_eq!(
        error,
        Error::NotPrepared {
            call: "all_reduce",
            rank: 0,
            what: "i32, 10, bit_xor".to_owned(),
            why: "a graph is captured"
        }
    );
    drop(stream.end_capture().unwrap());
    // Nor while a kernel waits for a rank of this very thread.
    let others: Vec<_> = (0..2).map(|rank| memory(&world, rank, &[1; 10])).collect();
    world.ranks[0].on(&world.streams[0]).barrier().unwrap();
    let late = world.ranks[0].on(&world.streams[0]).all_reduce(all(&world, 0, &others[0]), ReduceOp::BitXor);
    assert!(
        matches!(late, Err(Error::NotPrepared { why, .. }) if why.starts_with("other calls")),
        "{late:?}"
    );
    world.ranks[1].on(&world.streams[1]).barrier().unwrap();
    wait(&world);
    for rank in 0..2 {
        world.ranks[rank].on(&world.streams[rank]).barrier().unwrap();
    }
    wait(&world);
    world.ranks[0].check().unwrap();
    world.end();
}

#[test]
fn buffers_of_the_wrong_place_are_refused_before_anything_happens() {
    let Some(world) = pair(|builder| builder) else { return };
    let buffer = memory(&world, 0, &[5; 4]);
    let mut host = [1i32; 4];
    let refused = |result: unisono::Result<()>| match result {
        Err(Error::Place { rank: 0, expected, got, .. }) => (expected, got),
        other => panic!("{other:?}"),
    };
    let ordinal = world.devices[0].ordinal();
    let on_stream = world.ranks[0].on(&world.streams[0]);
    let (expected, got) = refused(on_stream.all_reduce(&mut host, ReduceOp::Sum));
    assert_eq!((expected, got), (format!("cuda:{ordinal} on this stream"), "host memory".to_owned()));
    let (_, got) = refused(world.ranks[0].all_reduce(all(&world, 0, &buffer), ReduceOp::Sum));
    assert_eq!(got, format!("cuda:{ordinal}"));
    // SAFETY: the call is refused.
    let elsewhere = unsafe { BufMut::<i32>::cuda(buffer.address(), 4, 77) };
    let (_, got) = refused(on_stream.all_reduce(elsewhere, ReduceOp::Sum));
    assert_eq!(got, "cuda:77");
    // SAFETY: as above.
    let (source, target) = unsafe {
        (Buf::<i32>::cuda(buffer.address(), 3, ordinal), BufMut::cuda(buffer.address() + 4, 3, ordinal))
    };
    let overlap = on_stream.all_reduce_into(source, target, ReduceOp::Sum);
    assert!(matches!(overlap, Err(Error::Argument { what: "memory of the output", .. })), "{overlap:?}");
    assert_eq!(values(&buffer), [5; 4]);
    world.ranks[0].check().unwrap();
    world.end();
}
