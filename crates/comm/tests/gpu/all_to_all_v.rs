//! All-to-alls of parts of any size that overwrite what they send, on all ranks or on some: every size and place, in graphs, and where
//! epochs and rounds wrap.

use unisono::{Counts, Operations};
use unisono_core::device::Form;

use crate::for_worlds;
use crate::message_ends::starts;
use crate::messages::{Room, data, finish};
use crate::world::{World, devices};

/// What comes takes the place of what goes, on the ranks that `overwrites` names. Sizes are those of pairs.
fn swap(
    world: &World,
    sizes: impl Fn(usize, usize) -> usize,
    overwrites: impl Fn(usize) -> bool,
    salt: usize,
) {
    let ranks = world.ranks.len();
    let size = |a: usize, b: usize| sizes(a.min(b), a.max(b));
    let (gap, at) = (salt % 2 * 5, salt % 3);
    let counts: Vec<Vec<usize>> =
        (0..ranks).map(|rank| (0..ranks).map(|peer| size(rank, peer)).collect()).collect();
    let join = |rank: usize, part: &dyn Fn(usize) -> Vec<u8>| {
        let mut content = Vec::new();
        for peer in 0..ranks {
            content.extend(part(peer));
            content.resize(content.len() + gap, 0x5a);
        }
        assert_eq!(content.len(), counts[rank].iter().sum::<usize>() + gap * ranks);
        content
    };
    let part = |from: usize, to: usize| data(from, to, salt, size(from, to));
    let sent: Vec<Room> =
        (0..ranks).map(|rank| Room::new(world, rank, at, &join(rank, &|to| part(rank, to)))).collect();
    let apart: Vec<Room> =
        sent.iter().enumerate().map(|(rank, room)| Room::empty(world, rank, 0, room.bytes)).collect();
    let received = |rank: usize| if overwrites(rank) { &sent[rank] } else { &apart[rank] };
    for rank in 0..ranks {
        let offsets = starts(&counts[rank], gap);
        let view = || Counts { counts: &counts[rank], offsets: Some(&offsets) };
        let on = world.ranks[rank].on(&world.streams[rank]);
        on.all_to_all_v(sent[rank].input(), view(), received(rank).output(), view()).unwrap();
    }
    finish(world);
    for rank in 0..ranks {
        let what = format!("{salt} on rank {rank} of {ranks}, {}", overwrites(rank));
        received(rank).check(&join(rank, &|from| part(from, rank)), &what);
    }
}

/// Sizes of pairs: nothing, packets, a tile of each channel or less, some.
fn size_of_pair(a: usize, b: usize, turn: usize) -> usize {
    [0, 17, 32_768, 32_769, 400_000, 700_001, 3 << 20, 1][(a * 3 + b * 5 + turn) % 8]
}

#[test]
fn what_comes_takes_the_place_of_what_goes() {
    for_worlds(|ranks, devices| {
        for (blocks, has_access) in [(0, true), (90, true), (5, true), (0, false)] {
            let world = World::new(ranks, devices, |builder| match blocks {
                0 => builder.peer_access(has_access),
                _ => builder.gpu_algorithm(Form::Bulk, blocks),
            });
            for turn in 0..8 {
                let sizes = |a, b| size_of_pair(a, b, turn);
                swap(&world, sizes, |_| true, turn);
                // Ranks need not do the same.
                swap(&world, sizes, |rank| rank % 2 == 0, turn + 1);
                // Nothing but packets.
                swap(&world, |a, b| (a * 1000 + b * 313 + turn) % 2000, |rank| rank != 1, turn);
            }
            world.end();
        }
    });
}

#[test]
fn large_parts_go_and_come_in_many_pieces() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    for has_access in [true, false] {
        let world = World::new(3, &devices, |builder| builder.peer_access(has_access));
        for (turn, bytes) in [4 << 20, (4 << 20) + 16, (33 << 20) + 5].into_iter().enumerate() {
            swap(&world, |a, b| bytes + a * 64 + b, |_| true, 3 * turn);
            swap(&world, |a, b| bytes + a * 64 + b * 16, |rank| rank == 2, 3 * turn + 1);
        }
        world.end();
    }
}

#[test]
fn epochs_and_rounds_that_wrap_serve_calls_in_place_too() {
    for_worlds(|ranks, devices| {
        for epoch in [0x7fff_fffa, 0xffff_fffa] {
            let world = World::new(ranks, devices, |builder| builder.first_epoch(epoch));
            for turn in 0..8 {
                swap(&world, |a, b| size_of_pair(a, b, turn), |rank| rank != 1, turn);
            }
            world.end();
        }
    });
}

#[test]
fn graphs_of_calls_in_place_are_replayed() {
    for_worlds(|ranks, devices| {
        let world = World::new(ranks, devices, |builder| builder);
        let bytes = 300_000;
        let counts = vec![bytes; ranks];
        let rooms: Vec<Room> = (0..ranks)
            .map(|rank| {
                let content: Vec<u8> = (0..ranks).flat_map(|to| data(rank, to, 0, bytes)).collect();
                Room::new(&world, rank, 0, &content)
            })
            .collect();
        let graphs: Vec<_> = (0..ranks)
            .map(|rank| {
                world.raw_streams[rank].begin_capture().unwrap();
                let on = world.ranks[rank].on(&world.streams[rank]);
                on.all_to_all_v(rooms[rank].input(), &counts, rooms[rank].output(), &counts).unwrap();
                world.raw_streams[rank].end_capture().unwrap()
            })
            .collect();
        // There, back, and there again.
        for turn in 0..3 {
            for (graph, stream) in graphs.iter().zip(&world.raw_streams) {
                graph.launch(stream).unwrap();
            }
            finish(&world);
            for (rank, room) in rooms.iter().enumerate() {
                let part = |peer: usize| match turn % 2 {
                    0 => data(peer, rank, 0, bytes),
                    _ => data(rank, peer, 0, bytes),
                };
                room.check(
                    &(0..ranks).flat_map(part).collect::<Vec<u8>>(),
                    &format!("turn {turn}, rank {rank}"),
                );
            }
        }
        drop(graphs);
        world.end();
    });
}
