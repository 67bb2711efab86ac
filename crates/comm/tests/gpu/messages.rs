//! Messages between GPUs: alone, in groups, replayed, beside collectives, and as the parts of collectives that only two ranks know of.

use std::time::Duration;

use unisono::cuda::DeviceBuffer;
use unisono::{
    Buf, BufMut, Builder, Counts, Error, Kind, Operations, Place, RawBuffer, ReduceOp, Result, group,
    recorder,
};
use unisono_core::device::Form;

use crate::case::Case;
use crate::for_worlds;
use crate::world::{World, devices};

/// Bytes before and behind a buffer that stay as they are.
const MARGIN: usize = 64;

/// What rank `rank` has for `peer`: every byte depends on both, on `salt`, and on where it lies.
fn data(rank: usize, peer: usize, salt: usize, bytes: usize) -> Vec<u8> {
    let seed = (rank * 31 + peer * 7 + salt * 101 + 1) as u32;
    let byte = |at: usize| {
        ((at as u32).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)).wrapping_add(seed) >> 13
    };
    (0..bytes).map(|at| byte(at) as u8).collect()
}

/// A buffer with `bytes` at `MARGIN + offset`, between bytes that must stay.
struct Room {
    buffer: DeviceBuffer,
    at: usize,
    bytes: usize,
    ordinal: u32,
}

impl Room {
    fn new(world: &World, rank: usize, offset: usize, content: &[u8]) -> Self {
        let bytes = content.len();
        let mut buffer = DeviceBuffer::new(&world.devices[rank], 2 * MARGIN + offset + bytes).unwrap();
        buffer.write(0, &vec![0xa5; buffer.bytes()]).unwrap();
        buffer.write(MARGIN + offset, content).unwrap();
        Self { buffer, at: MARGIN + offset, bytes, ordinal: world.devices[rank].ordinal() }
    }

    fn empty(world: &World, rank: usize, offset: usize, bytes: usize) -> Self {
        Self::new(world, rank, offset, &vec![0x5a; bytes])
    }

    fn input(&self) -> Buf<'static, u8> {
        // SAFETY: tests wait for their streams before a buffer goes.
        unsafe { Buf::cuda(self.buffer.address() + self.at as u64, self.bytes, self.ordinal) }
    }

    fn output(&self) -> BufMut<'static, u8> {
        // SAFETY: as above, and only one call writes it.
        unsafe { BufMut::cuda(self.buffer.address() + self.at as u64, self.bytes, self.ordinal) }
    }

    #[track_caller]
    fn check(&self, expected: &[u8], what: &str) {
        let mut got = vec![0; self.buffer.bytes()];
        self.buffer.read(0, &mut got).unwrap();
        let (before, rest) = got.split_at(self.at);
        let (content, behind) = rest.split_at(self.bytes);
        assert_eq!(content.len(), expected.len());
        let wrong = content.iter().zip(expected).position(|(got, expected)| got != expected);
        assert_eq!(wrong, None, "{what}: byte of {}", self.bytes);
        assert!(before.iter().chain(behind).all(|byte| *byte == 0xa5), "{what}: beside the buffer");
    }
}

fn finish(world: &World) {
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    world.ranks.iter().for_each(|rank| rank.check().unwrap());
}

/// Every rank sends `bytes` to the next one and receives as many from the previous one.
fn ring(world: &World, bytes: usize, (from, to): (usize, usize), salt: usize) {
    let ranks = world.ranks.len();
    let next = |rank: usize| (rank + 1) % ranks;
    let content = |rank| data(rank, next(rank), salt, bytes);
    let inputs: Vec<Room> = (0..ranks).map(|rank| Room::new(world, rank, from, &content(rank))).collect();
    let outputs: Vec<Room> = (0..ranks).map(|rank| Room::empty(world, rank, to, bytes)).collect();
    for rank in 0..ranks {
        let on = world.ranks[rank].on(&world.streams[rank]);
        let previous = (rank + ranks - 1) % ranks;
        on.send_recv(inputs[rank].input(), next(rank), outputs[rank].output(), previous, 7).unwrap();
    }
    finish(world);
    for rank in 0..ranks {
        outputs[next(rank)]
            .check(&content(rank), &format!("{bytes} bytes from {from} to {to}, to rank {}", next(rank)));
    }
}

const SIZES: [usize; 16] = [
    0,
    1,
    3,
    12,
    13,
    4096,
    8192,
    32_768,
    32_769,
    32_784,
    65_536,
    100_003,
    524_288,
    1 << 20,
    (1 << 20) + 17,
    (9 << 20) + 5,
];

#[test]
fn messages_of_every_size_and_alignment_arrive_whole() {
    for_worlds(|ranks, devices| {
        if ranks < 2 {
            return;
        }
        // Bulk copies where there are any, threads, few blocks, and one for each lane, whatever is counted.
        for blocks in [0, 90, 5, 1] {
            let world = World::new(ranks, devices, |builder| match blocks {
                0 => builder,
                _ => builder.gpu_algorithm(Form::Bulk, blocks),
            });
            for (at, bytes) in SIZES.into_iter().enumerate() {
                for offsets in [(0, 0), (0, 1), (4, 0), (3, 5), (16, 8)] {
                    if bytes <= 1 << 20 || matches!(offsets, (0, 0) | (3, 5)) {
                        ring(&world, bytes, offsets, at);
                    }
                }
            }
            world.end();
        }
    });
}

#[test]
fn messages_cross_pinned_host_memory_where_gpus_do_not_reach_each_other() {
    for_worlds(|ranks, devices| {
        if ranks != 3 {
            return;
        }
        let world = World::new(ranks, devices, |builder| builder.peer_access(false));
        for bytes in [0, 5, 32_768, 40_000, 3_000_001] {
            ring(&world, bytes, (0, 3), bytes);
        }
        world.end();
    });
}

#[test]
fn a_message_of_more_than_4_gib_arrives_whole() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    const PIECE: usize = 64 << 20;
    let bytes = (4 << 30) + (1 << 20) + 3;
    let world = World::new(2, &devices, |builder| builder.timeout(Some(Duration::from_secs(60))));
    let mut source = DeviceBuffer::new(&world.devices[0], bytes).unwrap();
    let target = DeviceBuffer::new(&world.devices[1], bytes).unwrap();
    // Every piece tells its number, and differs from byte to byte.
    let mut piece = data(0, 1, 5, PIECE);
    let mut number = |at: usize| {
        piece[..8].copy_from_slice(&(at as u64).to_le_bytes());
        piece[..PIECE.min(bytes - at)].to_vec()
    };
    for at in (0..bytes).step_by(PIECE) {
        source.write(at, &number(at)).unwrap();
    }
    // SAFETY: both buffers live until the streams were waited for.
    let (input, output) = unsafe {
        (
            Buf::<u8>::cuda(source.address(), bytes, world.devices[0].ordinal()),
            BufMut::<u8>::cuda(target.address(), bytes, world.devices[1].ordinal()),
        )
    };
    world.ranks[0].on(&world.streams[0]).send(input, 1, 0).unwrap();
    world.ranks[1].on(&world.streams[1]).recv(output, 0, 0).unwrap();
    finish(&world);
    let mut got = vec![0; PIECE];
    for at in (0..bytes).step_by(PIECE) {
        let expected = number(at);
        let got = &mut got[..expected.len()];
        target.read(at, got).unwrap();
        assert!(got == expected, "the piece at {at}");
    }
    world.end();
}

/// Several messages for every pair of ranks in one group, which every rank submits in an order of its own.
#[test]
fn a_group_carries_out_messages_with_all_peers_in_any_order() {
    const LENGTHS: [usize; 4] = [100, 300_000, 7, 5_000_000];
    for_worlds(|ranks, devices| {
        if ranks < 2 {
            return;
        }
        let world = World::new(ranks, devices, |builder| builder);
        let pairs: Vec<(usize, usize)> =
            (0..ranks).flat_map(|a| (0..ranks).map(move |b| (a, b))).filter(|(a, b)| a != b).collect();
        let rooms = |is_input: bool| -> Vec<Vec<Room>> {
            let room = |(from, to): (usize, usize), (at, length): (usize, &usize)| match is_input {
                true => Room::new(&world, from, at, &data(from, to, at, *length)),
                false => Room::empty(&world, to, at, *length),
            };
            pairs
                .iter()
                .map(|pair| LENGTHS.iter().enumerate().map(|some| room(*pair, some)).collect())
                .collect()
        };
        let (inputs, outputs) = (rooms(true), rooms(false));
        for rank in 0..ranks {
            group(|group| {
                let on = group.on(&world.ranks[rank], &world.streams[rank]);
                for at in 0..LENGTHS.len() {
                    // Some send first, some receive first, and peers come in different orders.
                    let mut mine: Vec<usize> = (0..pairs.len())
                        .filter(|pair| pairs[*pair].0 == rank || pairs[*pair].1 == rank)
                        .collect();
                    let number = mine.len();
                    mine.rotate_left(rank * 3 % number);
                    if rank % 2 == 1 {
                        mine.reverse();
                    }
                    for pair in mine {
                        let (from, to) = pairs[pair];
                        match from == rank {
                            true => on.send(inputs[pair][at].input(), to, at as u32)?,
                            false => on.recv(outputs[pair][at].output(), from, at as u32)?,
                        }
                    }
                }
                Ok(())
            })
            .unwrap();
        }
        finish(&world);
        for (pair, (from, to)) in pairs.iter().enumerate() {
            for (at, length) in LENGTHS.into_iter().enumerate() {
                outputs[pair][at]
                    .check(&data(*from, *to, at, length), &format!("message {at} from {from} to {to}"));
            }
        }
        world.end();
    });
}

/// One side has a group, the other single calls: what crosses is under way at once on the side of the group.
#[test]
fn a_group_meets_single_calls() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let world = World::new(2, &devices, |builder| builder);
    let bytes = 9 << 20;
    let inputs: Vec<Room> =
        (0..3).map(|at| Room::new(&world, usize::from(at == 2), 0, &data(0, 1, at, bytes))).collect();
    let outputs: Vec<Room> = (0..3).map(|at| Room::empty(&world, usize::from(at != 2), 0, bytes)).collect();
    group(|group| {
        let on = group.on(&world.ranks[0], &world.streams[0]);
        on.send(inputs[0].input(), 1, 0)?;
        on.send(inputs[1].input(), 1, 1)?;
        on.recv(outputs[2].output(), 1, 2)
    })
    .unwrap();
    let on = world.ranks[1].on(&world.streams[1]);
    on.recv(outputs[0].output(), 0, 0).unwrap();
    on.recv(outputs[1].output(), 0, 1).unwrap();
    on.send(inputs[2].input(), 0, 2).unwrap();
    finish(&world);
    outputs
        .iter()
        .enumerate()
        .for_each(|(at, room)| room.check(&data(0, 1, at, bytes), &format!("message {at}")));
    world.end();
}

#[test]
fn small_messages_do_not_wait_for_their_receiver() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let world = World::new(2, &devices, |builder| builder);
    let lengths: Vec<usize> = (0..60).map(|at| at * 13).collect();
    let room = |at: usize, length: &usize| Room::new(&world, 0, 0, &data(0, 1, at, *length));
    let inputs: Vec<Room> = lengths.iter().enumerate().map(|(at, length)| room(at, length)).collect();
    let outputs: Vec<Room> = lengths.iter().map(|length| Room::empty(&world, 1, 0, *length)).collect();
    for (at, room) in inputs.iter().enumerate() {
        world.ranks[0].on(&world.streams[0]).send(room.input(), 1, at as u32).unwrap();
    }
    // Nobody has received any.
    world.raw_streams[0].synchronize().unwrap();
    for (at, room) in outputs.iter().enumerate() {
        world.ranks[1].on(&world.streams[1]).recv(room.output(), 0, at as u32).unwrap();
    }
    finish(&world);
    for (at, room) in outputs.iter().enumerate() {
        room.check(&data(0, 1, at, lengths[at]), &format!("message {at}"));
    }
    world.end();
}

/// In a ring that is captured twice, each replay hands every value on by two ranks.
#[test]
fn graphs_of_messages_are_replayed_between_collectives_and_single_messages() {
    for_worlds(|ranks, devices| {
        if ranks < 2 {
            return;
        }
        for count in [1, 2000, 300_000] {
            let world = World::new(ranks, devices, |builder| builder);
            let content = |rank: usize| (rank as u32 + 1).to_le_bytes().repeat(count);
            let rooms: Vec<[Room; 2]> = (0..ranks)
                .map(|rank| {
                    [Room::new(&world, rank, 0, &content(rank)), Room::empty(&world, rank, 0, 4 * count)]
                })
                .collect();
            let hand_on = |rank: usize, [from, to]: [usize; 2]| {
                let on = world.ranks[rank].on(&world.streams[rank]);
                let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
                on.send_recv(rooms[rank][from].input(), next, rooms[rank][to].output(), previous, 3).unwrap();
            };
            let capture = |rank: usize| {
                world.raw_streams[rank].begin_capture().unwrap();
                hand_on(rank, [0, 1]);
                world.ranks[rank].on(&world.streams[rank]).barrier().unwrap();
                hand_on(rank, [1, 0]);
                world.raw_streams[rank].end_capture().unwrap()
            };
            let graphs: Vec<_> = (0..ranks).map(capture).collect();
            let (replays, singles) = (25, 7);
            for replay in 0..replays {
                for (rank, graph) in graphs.iter().enumerate() {
                    graph.launch(&world.raw_streams[rank]).unwrap();
                    if replay < singles {
                        hand_on(rank, [0, 1]);
                        let [to, from] =
                            rooms[rank].each_ref().map(|room| room.buffer.address() + MARGIN as u64);
                        // SAFETY: both are as long, and live until the stream was waited for.
                        unsafe { world.raw_streams[rank].copy(to, from, 4 * count) }.unwrap();
                    }
                }
            }
            finish(&world);
            let steps = 2 * replays + singles;
            for (rank, [room, _]) in rooms.iter().enumerate() {
                room.check(
                    &content((rank + steps * (ranks - 1)) % ranks),
                    &format!("{count} values on rank {rank}"),
                );
            }
            drop(graphs);
            world.end();
        }
    });
}

#[test]
fn packets_and_rounds_that_wrap_go_on() {
    for_worlds(|ranks, devices| {
        if ranks < 2 {
            return;
        }
        let world = World::new(ranks, devices, |builder| builder.first_epoch(0xffff_fffa));
        // Three of the first kind go once around the ring; a few of the second end the era of every channel.
        for turn in 0..14 {
            ring(&world, 32_700 + turn, (0, 0), turn);
            ring(&world, (1 << 20) + turn, (0, 0), turn);
            ring(&world, turn, (0, 0), turn);
        }
        // The epochs of collectives wrap meanwhile.
        for count in 0..12 {
            world.check(&Case { count: 100 * count, ..Case::default() }, None);
            ring(&world, 50_000, (0, 0), count);
        }
        world.end();
    });
}

#[test]
fn messages_and_collectives_of_one_communicator_do_not_mind_each_other() {
    for_worlds(|ranks, devices| {
        if ranks < 2 {
            return;
        }
        let world = World::new(ranks, devices, |builder| {
            let builder = builder.prepare(unisono::DType::I32, ReduceOp::Sum).unwrap();
            builder.prepare(unisono::DType::I32, ReduceOp::Max).unwrap()
        });
        let count = 70_000;
        let bytes = 5 << 20;
        let next = |rank: usize| (rank + 1) % ranks;
        let inputs: Vec<Room> =
            (0..ranks).map(|rank| Room::new(&world, rank, 0, &data(rank, next(rank), 1, bytes))).collect();
        let outputs: Vec<Room> = (0..ranks).map(|rank| Room::empty(&world, rank, 0, bytes)).collect();
        let sums: Vec<Room> =
            (0..ranks).map(|rank| Room::new(&world, rank, 0, &1i32.to_le_bytes().repeat(count))).collect();
        for _ in 0..5 {
            for rank in 0..ranks {
                let previous = (rank + ranks - 1) % ranks;
                // SAFETY: the buffer lives until the stream was waited for, and only the stream touches it.
                let sum = || unsafe {
                    BufMut::<i32>::cuda(
                        sums[rank].buffer.address() + MARGIN as u64,
                        count,
                        sums[rank].ordinal,
                    )
                };
                let on = world.ranks[rank].on(&world.streams[rank]);
                on.all_reduce(sum(), ReduceOp::Sum).unwrap();
                on.send_recv(inputs[rank].input(), next(rank), outputs[rank].output(), previous, 0).unwrap();
                group(|group| {
                    // Its collective comes first, on all ranks.
                    let on = group.on(&world.ranks[rank], &world.streams[rank]);
                    on.recv(outputs[rank].output(), previous, 1)?;
                    on.all_reduce(sum(), ReduceOp::Max)?;
                    on.send(inputs[rank].input(), next(rank), 1)
                })
                .unwrap();
            }
        }
        finish(&world);
        let sum = (ranks as i32).pow(5).to_le_bytes().repeat(count);
        for rank in 0..ranks {
            outputs[next(rank)].check(&data(rank, next(rank), 1, bytes), "a message");
            sums[rank].check(&sum, "a sum");
        }
        world.end();
    });
}

/// Counts from each rank to each: some nothing, some much.
fn table(ranks: usize, turn: usize) -> Vec<Vec<usize>> {
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
fn starts(counts: &[usize], gap: usize) -> Vec<usize> {
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
fn pair(configure: impl FnOnce(Builder) -> Builder) -> Option<World> {
    let devices = devices();
    (!devices.is_empty()).then(|| World::new(2, &devices, configure))
}

fn raw(room: &Room, dtype: unisono::DType) -> RawBuffer {
    let place = Place::Cuda { ordinal: room.ordinal };
    RawBuffer { ptr: room.buffer.address() + room.at as u64, count: room.bytes / dtype.size(), dtype, place }
}

/// The same message on rank 0, and another one on rank 1.
#[test]
fn messages_that_differ_are_named_on_both_ranks() {
    use unisono::{Call, DType};
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
    let in_place = on.all_to_all_v(room.input(), &[4, 4], room.output(), &[4, 4]);
    assert_eq!(what(in_place), ("memory of the output", "disjoint from the input, on a GPU".to_owned()));
    finish(&world);
    world.end();
}
