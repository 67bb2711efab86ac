//! All-to-alls whose counts lie in memory of the device: every size and type, in graphs, in windows, where epochs wrap, and parts that have
//! no room.

use std::time::Duration;

use unisono::cuda::DeviceBuffer;
use unisono::{
    AllToAllCounted, Buf, BufMut, Builder, Call, Count, Element, Error, Kind, Memory, Operations, Place,
    RawBuffer, Result,
};
use unisono_core::device::Form;

use crate::for_worlds;
use crate::message_ends::{pair, starts, table};
use crate::messages::{Room, data, finish};
use crate::world::{self, PATIENCE, World};

/// A number of a list of counts, as bytes and back.
trait Number: Count {
    fn to_bytes(value: u64) -> Vec<u8>;
    fn all(bytes: &[u8]) -> Vec<u64>;
}

impl Number for u32 {
    fn to_bytes(value: u64) -> Vec<u8> {
        (value as u32).to_le_bytes().to_vec()
    }

    fn all(bytes: &[u8]) -> Vec<u64> {
        bytes.as_chunks().0.iter().map(|number| u64::from(Self::from_le_bytes(*number))).collect()
    }
}

impl Number for u64 {
    fn to_bytes(value: u64) -> Vec<u8> {
        value.to_le_bytes().to_vec()
    }

    fn all(bytes: &[u8]) -> Vec<u64> {
        bytes.as_chunks().0.iter().map(|number| Self::from_le_bytes(*number)).collect()
    }
}

fn list<C: Number>(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|number| C::to_bytes(*number as u64)).collect()
}

/// What a rank gives to a counted call. Sizes are elements of `T`.
struct Sides<T, C> {
    input: Room,
    output: Room,
    counts: Room,
    offsets: Option<Room>,
    told: Room,
    kinds: std::marker::PhantomData<(T, C)>,
}

impl<T: Element, C: Number> Sides<T, C> {
    /// `content` behind `at` bytes, with `share` elements of room for what comes from each.
    fn new(world: &World, rank: usize, (at, content): (usize, &[u8]), share: usize) -> Self {
        let (ranks, lists) = (world.ranks.len(), size_of::<C>() * world.ranks.len());
        Self {
            input: Room::new(world, rank, at, content),
            output: Room::empty(world, rank, at, share * ranks * size_of::<T>()),
            counts: Room::new(world, rank, 0, &vec![0xff; lists]),
            offsets: None,
            told: Room::new(world, rank, 0, &vec![0xff; lists]),
            kinds: std::marker::PhantomData,
        }
    }

    fn count(&mut self, counts: &[usize]) {
        self.counts.buffer.write(self.counts.at, &list::<C>(counts)).unwrap();
    }

    fn submit(&self, world: &World, rank: usize) -> Result<()> {
        fn at<N: Element>(room: &Room) -> (u64, usize, u32) {
            (room.buffer.address() + room.at as u64, room.bytes / size_of::<N>(), room.ordinal)
        }
        // SAFETY: tests wait for their streams before the buffers go, and only one call at a time has them.
        let call = unsafe {
            let input = |(ptr, count, ordinal)| Buf::<C>::cuda(ptr, count, ordinal);
            let (data, output, told) = (at::<T>(&self.input), at::<T>(&self.output), at::<C>(&self.told));
            AllToAllCounted {
                input: Buf::<T>::cuda(data.0, data.1, data.2),
                send_counts: input(at::<C>(&self.counts)),
                send_offsets: self.offsets.as_ref().map(|offsets| input(at::<C>(offsets))),
                output: BufMut::<T>::cuda(output.0, output.1, output.2),
                recv_counts: BufMut::<C>::cuda(told.0, told.1, told.2),
            }
        };
        world.ranks[rank].on(&world.streams[rank]).all_to_all_counted(call)
    }

    fn told(&self) -> Vec<u64> {
        let mut bytes = vec![0; self.told.bytes];
        self.told.buffer.read(self.told.at, &mut bytes).unwrap();
        C::all(&bytes)
    }

    /// What came in, of parts that `part` gives by rank, and nothing else.
    fn check(&self, ranks: usize, part: impl Fn(usize) -> Vec<u8>, what: &str) {
        let mut expected = vec![0x5a; self.output.bytes];
        let mut told = Vec::new();
        for from in 0..ranks {
            let part = part(from);
            expected[from * self.output.bytes / ranks..][..part.len()].copy_from_slice(&part);
            told.push((part.len() / size_of::<T>()) as u64);
        }
        self.output.check(&expected, what);
        assert_eq!(self.told(), told, "{what}");
        self.told.check(&told.iter().flat_map(|count| C::to_bytes(*count)).collect::<Vec<_>>(), what);
    }
}

/// A call with these counts from each rank to each; parts lie `gap` elements apart, and everything behind `at` elements.
fn check<T: Element, C: Number>(world: &World, table: &[Vec<usize>], (gap, at): (usize, usize), salt: usize) {
    let (ranks, size) = (world.ranks.len(), size_of::<T>());
    let part = |from: usize, to: usize| data(from, to, salt, table[from][to] * size);
    let mut sides: Vec<Sides<T, C>> = (0..ranks)
        .map(|rank| {
            let most = table.iter().map(|row| row[rank]).max().unwrap();
            let mut content = Vec::new();
            for to in 0..ranks {
                content.extend(part(rank, to));
                content.resize(content.len() + gap * size, 0xee);
            }
            let mut sides = Sides::new(world, rank, (at * size, &content), most + rank);
            sides.count(&table[rank]);
            sides.offsets =
                (gap > 0).then(|| Room::new(world, rank, 0, &list::<C>(&starts(&table[rank], gap))));
            sides
        })
        .collect();
    for (rank, sides) in sides.iter_mut().enumerate() {
        sides.submit(world, rank).unwrap();
    }
    finish(world);
    for (rank, sides) in sides.iter().enumerate() {
        let what = format!("{size} bytes, gap {gap}, at {at}, {salt}, rank {rank} of {ranks}");
        sides.check(ranks, |from| part(from, rank), &what);
    }
}

/// Counts that fit into packets.
fn few(ranks: usize, turn: usize) -> Vec<Vec<usize>> {
    let count = |from: usize, to: usize| (from * 7 + to * 3 + turn) % 50;
    (0..ranks).map(|from| (0..ranks).map(|to| count(from, to)).collect()).collect()
}

#[test]
fn counts_from_the_device_move_what_they_say_and_tell_what_came() {
    for_worlds(|ranks, devices| {
        for blocks in [0, 90, 5] {
            let world = World::new(ranks, devices, |builder| match blocks {
                0 => builder,
                _ => builder.gpu_algorithm(Form::Bulk, blocks),
            });
            for turn in 0..5 {
                check::<u8, u32>(&world, &few(ranks, turn), (0, turn), turn);
                check::<u8, u64>(&world, &table(ranks, turn), (turn % 2 * 3, 0), turn);
                check::<f32, u32>(&world, &table(ranks, turn), (turn % 2 * 4, turn % 3), turn);
            }
            world.end();
        }
        let world = World::new(ranks, devices, |builder| builder.peer_access(false));
        for turn in 0..5 {
            check::<f64, u32>(&world, &few(ranks, turn), (1, 0), turn);
            check::<u8, u32>(&world, &table(ranks, turn), (0, turn), turn);
        }
        world.end();
    });
}

#[test]
fn a_graph_moves_what_the_counts_say_when_it_is_launched() {
    for_worlds(|ranks, devices| {
        let world = World::new(ranks, devices, |builder| builder);
        let most = 700_010;
        let mut sides: Vec<Sides<u8, u32>> = (0..ranks)
            .map(|rank| Sides::new(&world, rank, (0, &data(rank, 0, 3, most * ranks)), most))
            .collect();
        let graphs: Vec<_> = (0..ranks)
            .map(|rank| {
                world.raw_streams[rank].begin_capture().unwrap();
                sides[rank].submit(&world, rank).unwrap();
                world.raw_streams[rank].end_capture().unwrap()
            })
            .collect();
        for turn in 0..5 {
            let table = table(ranks, turn);
            for (sides, row) in sides.iter_mut().zip(&table) {
                sides.count(row);
                sides.output.buffer.write(sides.output.at, &vec![0x5a; sides.output.bytes]).unwrap();
            }
            for (graph, stream) in graphs.iter().zip(&world.raw_streams) {
                graph.launch(stream).unwrap();
            }
            finish(&world);
            for (rank, sides) in sides.iter().enumerate() {
                let part = |from: usize| {
                    let begin = starts(&table[from], 0)[rank];
                    data(from, 0, 3, most * ranks)[begin..][..table[from][rank]].to_vec()
                };
                sides.check(ranks, part, &format!("turn {turn} on rank {rank} of {ranks}"));
            }
        }
        drop(graphs);
        world.end();
    });
}

/// The error of both ranks.
fn failure(world: &World, first: usize) -> Error {
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    let error = world.ranks[first].check().unwrap_err();
    assert_eq!(world.ranks[1 - first].check().unwrap_err(), error);
    error
}

#[test]
fn a_part_that_has_no_room_is_named_on_both_ranks_and_nothing_is_written() {
    // In packets, and in tiles.
    for part in [100, 300_000] {
        let Some(world) = pair(|builder| builder) else { return };
        let mut sides: Vec<Sides<u8, u32>> = [part, part - 1]
            .iter()
            .enumerate()
            .map(|(rank, share)| Sides::new(&world, rank, (0, &data(rank, 0, 0, 2 * part)), *share))
            .collect();
        for (rank, sides) in sides.iter_mut().enumerate() {
            sides.count(&[[7, part], [7, 7]][rank]);
            sides.submit(&world, rank).unwrap();
        }
        let error = failure(&world, 1);
        let expected = Error::Counts {
            during: "all_to_all_counted #1".to_owned(),
            from: 0,
            to: 1,
            needed: part as u64,
            room: part as u64 - 1,
            is_input: false,
        };
        assert_eq!(error, expected);
        assert_eq!(sides[1].told()[0], 0);
        // Only what stays may have been written.
        let mut got = vec![0; sides[1].output.bytes];
        sides[1].output.buffer.read(sides[1].output.at, &mut got).unwrap();
        let mut content = vec![0x5a; part - 1];
        content.extend_from_slice(&got[part - 1..]);
        sides[1].output.check(&content, "what has no room");
    }
}

#[test]
fn a_part_outside_of_the_input_is_named_on_both_ranks_and_not_sent() {
    // Numbers that end nowhere, and one element too many.
    for (from, count, needed) in [(u64::MAX, 2, u64::MAX), (5, 96, 101)] {
        let Some(world) = pair(|builder| builder) else { return };
        let mut sides: Vec<Sides<u8, u64>> =
            (0..2).map(|rank| Sides::new(&world, rank, (0, &data(rank, 0, 0, 100)), 100)).collect();
        sides[0].count(&[10, 10]);
        sides[1].count(&[count, 10]);
        sides[1].offsets = Some(Room::new(&world, 1, 0, &[from, 0].map(u64::to_le_bytes).concat()));
        for (rank, sides) in sides.iter().enumerate() {
            sides.submit(&world, rank).unwrap();
        }
        let during = "all_to_all_counted #1".to_owned();
        let expected = Error::Counts { during, from: 1, to: 0, needed, room: 100, is_input: true };
        assert_eq!(failure(&world, 1), expected);
        assert_eq!(sides[0].told()[1], 0);
        let mut got = vec![0; 100];
        sides[0].output.buffer.read(sides[0].output.at + 100, &mut got).unwrap();
        assert_eq!(got, [0x5a; 100]);
    }
}

#[test]
fn counts_of_ranks_that_did_not_come_are_nought_and_the_wait_ends() {
    let Some(world) = pair(|builder| builder.timeout(Some(Duration::from_secs(3)))) else { return };
    let mut sides: Sides<u8, u32> = Sides::new(&world, 0, (0, &data(0, 0, 0, 100)), 100);
    sides.count(&[10, 10]);
    // The second comes when all is over.
    sides.submit(&world, 0).unwrap();
    sides.submit(&world, 0).unwrap();
    world.raw_streams[0].synchronize().unwrap();
    let error = world.ranks[0].check().unwrap_err();
    let Error::Timeout { rank: 0, missing, .. } = &error else { panic!("{error}") };
    assert!(missing.len() == 1 && missing[0].starts_with("rank 1"), "{error}");
    assert_eq!(sides.told(), [0, 0]);
}

#[test]
fn counted_calls_that_cannot_go_well_are_refused_before_anything_happens() {
    let Some(world) = pair(|builder| builder) else { return };
    let ordinal = world.devices[0].ordinal();
    let memory = DeviceBuffer::new(&world.devices[0], 4096).unwrap();
    let submit = |buffers: [(u64, usize, Kinds); 4]| {
        let raw = buffers.map(|(at, count, kind)| RawBuffer {
            ptr: memory.address() + at,
            count,
            dtype: kind.0,
            place: kind.1,
        });
        // SAFETY: all calls are refused.
        let call = unsafe { Call::from_raw(Kind::AllToAllCounted, &raw, &[]) };
        match world.ranks[0].on(&world.streams[0]).submit(call).unwrap_err() {
            Error::Argument { what, expected, .. } => (what, expected),
            Error::Place { expected, .. } => ("place", expected),
            error => panic!("{error}"),
        }
    };
    let here = Place::Cuda { ordinal };
    let (bytes, u32s) = ((unisono::DType::U8, here), (unisono::DType::U32, here));
    let refused = |what, expected: &str| (what, expected.to_owned());
    let fits = [(0, 100, bytes), (1024, 100, bytes), (2048, 2, u32s), (3072, 2, u32s)];
    let with = |at: usize, buffer| {
        let mut buffers = fits;
        buffers[at] = buffer;
        submit(buffers)
    };
    assert_eq!(with(2, (2049, 2, u32s)), refused("send counts", "at a multiple of 4 bytes"));
    assert_eq!(with(2, (2048, 3, u32s)), refused("send counts", "2 of u32"));
    assert_eq!(with(2, (2048, 2, bytes)), refused("dtype of the send counts", "u32 or u64"));
    assert_eq!(with(3, (3072, 2, bytes)), refused("receive counts", "2 of u32"));
    assert_eq!(with(1, (1024, 99, bytes)), refused("count of the output", "a multiple of 2"));
    assert_eq!(with(1, (50, 100, bytes)), refused("memory of the output", "disjoint from all else"));
    let host = (unisono::DType::U32, Place::Host);
    assert_eq!(with(2, (2048, 2, host)), refused("place", &format!("cuda:{ordinal} on this stream")));
    finish(&world);
    world.end();
}

type Kinds = (unisono::DType, Place);

#[test]
fn counts_are_told_into_windows_that_the_host_lends() {
    let prepare = |builder: Builder| builder.timeout(PATIENCE);
    let tools = |_: usize, ordinal: u32| {
        let device = unisono::cuda::Device::new(ordinal).unwrap();
        unisono::Stream::from(unisono::cuda::Stream::new(&device).unwrap())
    };
    world::on_threads(2, prepare, tools, |rank, stream| {
        let (me, table) = (rank.rank(), [[3u32, 40_000], [0, 5]]);
        let mut input = rank.window::<u16>(50_000, Memory::Pinned).unwrap();
        let mut output = rank.window::<u16>(2 * 40_000, Memory::Pinned).unwrap();
        let mut counts = rank.window::<u32>(4, Memory::Pinned).unwrap();
        let element = |from: usize, at: usize| (from * 30_011 + at * 7) as u16;
        let content = input.lend().unwrap().iter_mut().enumerate();
        content.for_each(|(at, value)| *value = element(me, at));
        output.lend().unwrap().fill(9);
        counts.lend().unwrap().copy_from_slice(&[table[me][0], table[me][1], 77, 77]);
        let mut told = rank.window::<u32>(2, Memory::Pinned).unwrap();
        rank.on(stream)
            .all_to_all_counted(AllToAllCounted {
                input: input.range(0..50_000),
                send_counts: counts.range(0..2),
                send_offsets: None,
                output: output.range_mut(0..2 * 40_000),
                recv_counts: told.range_mut(0..2),
            })
            .unwrap();
        assert_eq!(told.lend().unwrap(), [table[0][me], table[1][me]]);
        for (from, share) in output.lend().unwrap().chunks(40_000).enumerate() {
            let (begin, count) =
                (if me == 0 { 0 } else { table[from][0] as usize }, table[from][me] as usize);
            let came = share[..count].iter().copied();
            assert!(came.eq((begin..begin + count).map(|at| element(from, at))), "from {from} to {me}");
            assert!(share[count..].iter().all(|value| *value == 9), "from {from} to {me}");
        }
        told.close(&rank).unwrap();
        counts.close(&rank).unwrap();
        output.close(&rank).unwrap();
        input.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn epochs_and_rounds_that_wrap_serve_counted_calls_too() {
    for_worlds(|ranks, devices| {
        for epoch in [0x7fff_fffa, 0xffff_fffa] {
            let world = World::new(ranks, devices, |builder| builder.first_epoch(epoch));
            for turn in 0..6 {
                check::<u8, u32>(&world, &table(ranks, turn), (0, 0), turn);
                check::<u8, u32>(&world, &few(ranks, turn), (0, 0), turn);
            }
            world.end();
        }
    });
}
