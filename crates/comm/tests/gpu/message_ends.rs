//! Collectives whose parts only two ranks know of, messages from any rank, and messages that cannot go well: those that differ, that nobody
//! receives, that are aborted or refused.

use std::time::Duration;

use unisono::{
    Builder, Call, Counts, DType, Error, Kind, Operations, Place, RawBuffer, Result, group, recorder,
};

use crate::for_worlds;
use crate::messages::{Room, data, finish};
use crate::world::{World, devices};

/// Counts from each rank to each: some nothing, some much.
pub(crate) fn table(ranks: usize, turn: usize) -> Vec<Vec<usize>> {
    let count = |from: usize, to: usize| match (from * 5 + to * 3 + turn) % 5 {
        0 => 0,
        1 => 1 + from,
        2 => 3000 + to,
        3 => 40_000 + from * 7 + to,
        _ => 700_001 + turn,
    };
    (0..ranks).map(|from| (0..ranks).map(|to| count(from, to)).collect()).collect()
}

/// Where parts of so many elements begin, with `gap` elements between them.
pub(crate) fn starts(counts: &[usize], gap: usize) -> Vec<usize> {
    let mut at = 0;
    counts
        .iter()
        .map(|count| {
            let start = at;
            at += count + gap;
            start
        })
        .collect()
}

#[test]
fn parts_of_any_size_go_to_everybody_from_the_root_and_to_the_root() {
    for_worlds(|ranks, devices| {
        let world = World::new(ranks, devices, |builder| builder);
        for turn in 0..5 {
            let (table, gap) = (table(ranks, turn), turn % 2 * 3);
            // Everybody to everybody, with gaps in the output.
            let into = |rank: usize| -> Vec<usize> { table.iter().map(|row| row[rank]).collect() };
            let sent = |from: usize, to: usize| data(from, to, turn, table[from][to]);
            let inputs: Vec<Room> = (0..ranks)
                .map(|rank| {
                    Room::new(
                        &world,
                        rank,
                        turn,
                        &(0..ranks).flat_map(|to| sent(rank, to)).collect::<Vec<_>>(),
                    )
                })
                .collect();
            let lengths = |rank: usize| into(rank).iter().sum::<usize>() + gap * ranks;
            let outputs: Vec<Room> =
                (0..ranks).map(|rank| Room::empty(&world, rank, 0, lengths(rank))).collect();
            for rank in 0..ranks {
                let (counts, offsets) = (into(rank), starts(&into(rank), gap));
                let into = Counts { counts: &counts, offsets: Some(&offsets) };
                let on = world.ranks[rank].on(&world.streams[rank]);
                on.all_to_all_v(inputs[rank].input(), &table[rank], outputs[rank].output(), into).unwrap();
            }
            finish(&world);
            for (rank, output) in outputs.iter().enumerate() {
                let mut expected = vec![0x5a; output.bytes];
                for (from, at) in starts(&into(rank), gap).into_iter().enumerate() {
                    expected[at..][..table[from][rank]].copy_from_slice(&sent(from, rank));
                }
                output.check(&expected, &format!("all_to_all_v {turn} on rank {rank} of {ranks}"));
            }
            // To the root and from it: row 0 tells the counts.
            let (root, counts) = (turn % ranks, &table[0]);
            let all: Vec<u8> = (0..ranks).flat_map(|rank| data(rank, 9, turn, counts[rank])).collect();
            let parts: Vec<Room> = (0..ranks)
                .map(|rank| Room::new(&world, rank, 0, &data(rank, 9, turn, counts[rank])))
                .collect();
            let gathered = Room::empty(&world, root, 1, all.len());
            let scattered: Vec<Room> =
                (0..ranks).map(|rank| Room::empty(&world, rank, 2, counts[rank])).collect();
            for rank in 0..ranks {
                let on = world.ranks[rank].on(&world.streams[rank]);
                on.gather_v(parts[rank].input(), gathered.output(), counts, root).unwrap();
                on.scatter_v(gathered.input(), scattered[rank].output(), counts, root).unwrap();
            }
            finish(&world);
            gathered.check(&all, "gather_v");
            for (rank, room) in scattered.iter().enumerate() {
                room.check(&data(rank, 9, turn, counts[rank]), &format!("scatter_v to rank {rank}"));
            }
        }
        world.end();
    });
}

/// A world of two ranks, on two devices where there are two.
pub(crate) fn pair(configure: impl FnOnce(Builder) -> Builder) -> Option<World> {
    let devices = devices();
    (!devices.is_empty()).then(|| World::new(2, &devices, configure))
}

fn raw(room: &Room, dtype: DType) -> RawBuffer {
    let place = Place::Cuda { ordinal: room.ordinal };
    RawBuffer { ptr: room.buffer.address() + room.at as u64, count: room.bytes / dtype.size(), dtype, place }
}

/// The same message on rank 0, and another one on rank 1.
#[test]
fn messages_that_differ_are_named_on_both_ranks() {
    for (kind, dtype, bytes, other) in [
        (Kind::Recv { from: 0, tag: 8 }, DType::F32, 400, "f32, 100, tag 8"),
        (Kind::Recv { from: 0, tag: 7 }, DType::I32, 400, "i32, 100, tag 7"),
        (Kind::Recv { from: 0, tag: 7 }, DType::F32, 404, "f32, 101, tag 7"),
        (Kind::Recv { from: 0, tag: 7 }, DType::F32, 400_000, "f32, 100000, tag 7"),
    ] {
        let Some(world) = pair(|builder| builder) else { return };
        let rooms = [Room::empty(&world, 0, 0, 400), Room::empty(&world, 1, 0, bytes)];
        // SAFETY: the buffers live until the streams were waited for.
        let (send, receive) = unsafe {
            (
                Call::from_raw(Kind::Send { to: 1, tag: 7 }, &[raw(&rooms[0], DType::F32)], &[]),
                Call::from_raw(kind, &[raw(&rooms[1], dtype)], &[]),
            )
        };
        world.ranks[0].on(&world.streams[0]).submit(send).unwrap();
        world.ranks[1].on(&world.streams[1]).submit(receive).unwrap();
        world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
        let expected = Error::Mismatch {
            left: format!("recv from 0 on rank 1 ({other})"),
            right: "send to 1 on rank 0 (f32, 100, tag 7)".to_owned(),
        };
        assert_eq!(world.ranks[1].check().unwrap_err(), expected);
        assert_eq!(world.ranks[0].check().unwrap_err(), expected);
    }
}

#[test]
fn parts_that_differ_are_named_with_their_ranks() {
    let Some(world) = pair(|builder| builder) else { return };
    let rooms: Vec<[Room; 2]> =
        (0..2).map(|rank| [Room::empty(&world, rank, 0, 300), Room::empty(&world, rank, 0, 300)]).collect();
    // Rank 1 expects 9 of rank 0, which sends 8.
    for (rank, [out, into]) in [[[100, 8], [100, 20]], [[20, 5], [9, 5]]].into_iter().enumerate() {
        let [source, target] = &rooms[rank];
        let on = world.ranks[rank].on(&world.streams[rank]);
        on.all_to_all_v(source.input(), &out, target.output(), &into).unwrap();
    }
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    let expected = Error::Mismatch {
        left: "all_to_all_v from 0 on rank 1 (u8, 9)".to_owned(),
        right: "all_to_all_v to 1 on rank 0 (u8, 8)".to_owned(),
    };
    assert_eq!(world.ranks[1].check().unwrap_err(), expected);
    assert_eq!(world.ranks[0].check().unwrap_err(), expected);
}

#[test]
fn a_message_from_any_rank_is_received_from_who_has_sent_it() {
    for_worlds(|ranks, devices| {
        if ranks != 3 {
            return;
        }
        let world = World::new(ranks, devices, |builder| builder);
        for bytes in [5, 200_000] {
            let inputs: Vec<Room> =
                (0..3).map(|rank| Room::new(&world, rank, 0, &data(rank, 0, 2, bytes))).collect();
            let outputs: Vec<Room> = (0..4).map(|_| Room::empty(&world, 0, 0, bytes)).collect();
            let send = |rank: usize, tag| {
                world.ranks[rank].on(&world.streams[rank]).send(inputs[rank].input(), 0, tag).unwrap();
            };
            let receive = |at: usize, tag| {
                let from = world.ranks[0].on(&world.streams[0]).recv_any(outputs[at].output(), tag).unwrap();
                world.raw_streams[0].synchronize().unwrap();
                outputs[at].check(&data(from, 0, 2, bytes), &format!("message {at}, from rank {from}"));
                from
            };
            send(1, 4);
            send(2, 5);
            assert_eq!((receive(0, 5), receive(1, 4)), (2, 1));
            // Both send the same: each is received once.
            send(1, 6);
            send(2, 6);
            let mut from = [receive(2, 6), receive(3, 6)];
            from.sort_unstable();
            assert_eq!(from, [1, 2]);
        }
        let stream = &world.raw_streams[0];
        let room = Room::empty(&world, 0, 0, 8);
        stream.begin_capture().unwrap();
        let refused = world.ranks[0].on(&world.streams[0]).recv_any(room.output(), 0);
        drop(stream.end_capture().unwrap());
        assert!(matches!(&refused, Err(Error::Argument { what: "stream", .. })), "{refused:?}");
        finish(&world);
        world.end();
    });
}

#[test]
fn a_message_that_nobody_receives_is_told_and_ends_after_the_patience() {
    let Some(world) = pair(|builder| builder.timeout(Some(Duration::from_secs(3)))) else { return };
    let room = Room::empty(&world, 0, 0, 64 << 20);
    world.ranks[0].on(&world.streams[0]).send(room.input(), 1, 7).unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    drop(world.ranks[1].observer().gpu_calls(0).unwrap());
    let found = recorder::find(Some(&[std::process::id()])).unwrap();
    let all: Vec<String> =
        found.recordings.iter().map(|recording| recorder::why(&recording.snapshot().unwrap())).collect();
    let waits = "The GPU of rank 0 has waited in send to rank 1 (tag 7) of u8, 67108864, tag 7 for ";
    let tells = |text: &String| text.contains(waits) && text.contains("; rank 1 has received none.");
    assert!(all.iter().any(tells), "{all:#?}");
    world.raw_streams[0].synchronize().unwrap();
    let error = world.ranks[0].check().unwrap_err();
    let Error::Timeout { rank: 0, call, missing, waited_ms } = &error else { panic!("{error:?}") };
    assert_eq!(call, "send to rank 1 (tag 7) on its GPU");
    assert!(missing.len() == 1 && missing[0].starts_with("rank 1"), "{missing:?}");
    assert!((3000..5000).contains(waited_ms), "{waited_ms}");
}

#[test]
fn an_abort_ends_messages_that_wait() {
    let Some(world) = pair(|builder| builder) else { return };
    // Nobody takes the one, and nobody sends the other.
    let rooms = [Room::empty(&world, 0, 0, 64 << 20), Room::empty(&world, 0, 0, 100)];
    world.ranks[0].on(&world.streams[0]).send(rooms[0].input(), 1, 7).unwrap();
    world.ranks[0].on(&world.streams[0]).recv(rooms[1].output(), 1, 7).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    world.ranks[1].observer().abort("a test wants it so");
    for (stream, rank) in world.raw_streams.iter().zip(&world.ranks) {
        stream.synchronize().unwrap();
        assert!(matches!(rank.check(), Err(Error::Aborted { rank: 1, .. })), "{:?}", rank.check());
    }
}

#[test]
fn messages_that_cannot_be_sent_are_refused_before_anything_happens() {
    let Some(world) = pair(|builder| builder) else { return };
    let room = Room::empty(&world, 0, 0, 8);
    let on = world.ranks[0].on(&world.streams[0]);
    let what = |result: Result<()>| match result {
        Err(Error::Argument { rank: 0, what, expected, .. }) => (what, expected),
        other => panic!("{other:?}"),
    };
    assert_eq!(what(on.send(room.input(), 0, 1)), ("receiver", "another rank below 2".to_owned()));
    assert_eq!(what(on.recv(room.output(), 2, 1)), ("sender", "another rank below 2".to_owned()));
    let mut host = [1u8; 4];
    let elsewhere = on.recv(&mut host, 1, 1);
    assert!(matches!(elsewhere, Err(Error::Place { rank: 0, .. })), "{elsewhere:?}");
    let too_many = group(|group| {
        let on = group.on(&world.ranks[0], &world.streams[0]);
        (0..129).try_for_each(|tag| on.send(room.input(), 1, tag))
    });
    assert_eq!(what(too_many), ("number of messages in the group", "at most 128 on its GPU".to_owned()));
    let other = unisono::cuda::Stream::new(&world.devices[0]).unwrap();
    // SAFETY: the raw stream lies beside this one and lives as long.
    let other = unsafe { unisono::Stream::cuda(other.raw(), other.device().ordinal()) }.unwrap();
    let two_streams = group(|group| {
        group.on(&world.ranks[0], &world.streams[0]).send(room.input(), 1, 0)?;
        group.on(&world.ranks[0], &other).recv(room.output(), 1, 0)
    });
    assert_eq!(what(two_streams).0, "stream");
    finish(&world);
    world.end();
}
