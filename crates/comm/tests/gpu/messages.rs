//! Messages between GPUs: alone, in groups, replayed, beside collectives, and as the parts of collectives that only two ranks know of.

use std::time::Duration;

use unisono::cuda::DeviceBuffer;
use unisono::{Buf, BufMut, Operations, ReduceOp, group};
use unisono_core::device::Form;

use crate::case::Case;
use crate::for_worlds;
use crate::world::{World, devices};

/// Bytes before and behind a buffer that stay as they are.
const MARGIN: usize = 64;

/// What rank `rank` has for `peer`: every byte depends on both, on `salt`, and on where it lies.
pub(crate) fn data(rank: usize, peer: usize, salt: usize, bytes: usize) -> Vec<u8> {
    let seed = (rank * 31 + peer * 7 + salt * 101 + 1) as u32;
    let byte = |at: usize| {
        ((at as u32).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)).wrapping_add(seed) >> 13
    };
    (0..bytes).map(|at| byte(at) as u8).collect()
}

/// A buffer with `bytes` at `MARGIN + offset`, between bytes that must stay.
pub(crate) struct Room {
    pub(crate) buffer: DeviceBuffer,
    pub(crate) at: usize,
    pub(crate) bytes: usize,
    pub(crate) ordinal: u32,
}

impl Room {
    pub(crate) fn new(world: &World, rank: usize, offset: usize, content: &[u8]) -> Self {
        let bytes = content.len();
        let mut buffer = DeviceBuffer::new(&world.devices[rank], 2 * MARGIN + offset + bytes).unwrap();
        buffer.write(0, &vec![0xa5; buffer.bytes()]).unwrap();
        buffer.write(MARGIN + offset, content).unwrap();
        Self { buffer, at: MARGIN + offset, bytes, ordinal: world.devices[rank].ordinal() }
    }

    pub(crate) fn empty(world: &World, rank: usize, offset: usize, bytes: usize) -> Self {
        Self::new(world, rank, offset, &vec![0x5a; bytes])
    }

    pub(crate) fn input(&self) -> Buf<'static, u8> {
        // SAFETY: tests wait for their streams before a buffer goes.
        unsafe { Buf::cuda(self.buffer.address() + self.at as u64, self.bytes, self.ordinal) }
    }

    pub(crate) fn output(&self) -> BufMut<'static, u8> {
        // SAFETY: as above, and only one call writes it.
        unsafe { BufMut::cuda(self.buffer.address() + self.at as u64, self.bytes, self.ordinal) }
    }

    #[track_caller]
    pub(crate) fn check(&self, expected: &[u8], what: &str) {
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

pub(crate) fn finish(world: &World) {
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

/// More packets than a ring has, by many blocks on the one side and few on the other: the sender goes on by what was taken meanwhile.
#[test]
fn packets_of_a_group_that_fill_the_ring_meet_single_calls() {
    const LENGTHS: [usize; 7] = [1 << 20, 5, 900_000, 0, 1 << 20, 700_001, 2 << 20];
    let Some(devices) = Some(devices()).filter(|devices| !devices.is_empty()) else { return };
    let world = World::new(2, &devices, |builder| builder);
    for turn in 0..3 {
        let content = |at: usize| data(0, 1, turn * 7 + at, LENGTHS[at]);
        let inputs: Vec<Room> =
            (0..LENGTHS.len()).map(|at| Room::new(&world, turn % 2, at, &content(at))).collect();
        let outputs: Vec<Room> =
            LENGTHS.iter().map(|length| Room::empty(&world, 1 - turn % 2, 0, *length)).collect();
        let (from, to) = (turn % 2, 1 - turn % 2);
        let send = || {
            group(|group| {
                let on = group.on(&world.ranks[from], &world.streams[from]);
                inputs.iter().enumerate().try_for_each(|(at, room)| on.send(room.input(), to, at as u32))
            })
        };
        let receive = || {
            let on = world.ranks[to].on(&world.streams[to]);
            outputs.iter().enumerate().for_each(|(at, room)| {
                on.recv(room.output(), from, at as u32).unwrap();
            });
        };
        // The first to come waits for the other.
        if turn == 2 {
            receive();
            send().unwrap();
        } else {
            send().unwrap();
            receive();
        }
        finish(&world);
        for (at, room) in outputs.iter().enumerate() {
            room.check(&content(at), &format!("message {at} of turn {turn}"));
        }
    }
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
        // Three of the first kind go about once around the ring; a few of the second end the era of every channel.
        for turn in 0..14 {
            ring(&world, 524_000 + turn, (0, 0), turn);
            ring(&world, (1 << 20) + 1 + turn, (0, 0), turn);
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
