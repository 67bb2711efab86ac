//! All-to-all with counts in memory: what moves and what is told, what is refused, and parts that have no room.

use unisono::{AllToAllCounted, Communicator, Count, Error, Memory, Operations};

use crate::random::{self, Random};
use crate::support::threads::on_threads;

/// What rank `from` has for `to` at element `at`.
fn value(from: usize, to: usize, at: usize) -> u32 {
    (from * 1_000_003 + to * 50_021 + at) as u32 ^ 0x5a5a_0000
}

const POISON: u32 = 0xdead_beef;

/// Sizes from each rank to each, where each rank's parts begin, and the elements of its input.
struct Table {
    counts: Vec<Vec<usize>>,
    offsets: Option<Vec<Vec<usize>>>,
    inputs: Vec<usize>,
}

impl Table {
    /// Parts of up to `most` elements, in the order of ranks or, `spread`, in reverse with holes between them.
    fn new(ranks: usize, most: usize, spread: bool, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut size = || if most == 0 || random.once_in(4) { 0 } else { random.count(most) };
        let counts: Vec<Vec<usize>> = (0..ranks).map(|_| (0..ranks).map(|_| size()).collect()).collect();
        let backwards = |row: &Vec<usize>| -> Vec<usize> {
            (0..ranks).map(|rank| row[rank + 1..].iter().map(|count| count + 2).sum()).collect()
        };
        let offsets = spread.then(|| counts.iter().map(backwards).collect());
        let inputs = counts.iter().map(|row| row.iter().sum::<usize>() + 2 * ranks).collect();
        Self { counts, offsets, inputs }
    }

    fn begins(&self, from: usize, to: usize) -> usize {
        match &self.offsets {
            Some(offsets) => offsets[from][to],
            None => self.counts[from][..to].iter().sum(),
        }
    }

    fn input(&self, from: usize) -> Vec<u32> {
        let mut input = vec![POISON; self.inputs[from]];
        for (to, count) in self.counts[from].iter().enumerate() {
            let part = &mut input[self.begins(from, to)..][..*count];
            part.iter_mut().enumerate().for_each(|(at, element)| *element = value(from, to, at));
        }
        input
    }

    /// What rank `to` has afterwards, with room for `share` elements from each.
    fn output(&self, to: usize, share: usize) -> Vec<u32> {
        let from = |from: usize| (0..share).map(move |at| (from, at));
        let element = |(from, at): (usize, usize)| match at < self.counts[from][to] {
            true => value(from, to, at),
            false => POISON,
        };
        (0..self.counts.len()).flat_map(from).map(element).collect()
    }

    fn column(&self, to: usize) -> Vec<usize> {
        self.counts.iter().map(|row| row[to]).collect()
    }
}

fn numbers<C: Count + TryFrom<usize>>(values: &[usize]) -> Vec<C> {
    values.iter().map(|value| C::try_from(*value).ok().unwrap()).collect()
}

/// One call, with what it should give.
fn check<C: Count + TryFrom<usize> + TryInto<usize>>(rank: &Communicator, table: &Table, name: &str) {
    let me = rank.rank();
    let share = table.column(me).into_iter().max().unwrap() + me;
    let (input, send_counts) = (table.input(me), numbers::<C>(&table.counts[me]));
    let offsets = table.offsets.as_ref().map(|offsets| numbers::<C>(&offsets[me]));
    let mut output = vec![POISON; share * rank.world_size()];
    let mut recv_counts = numbers::<C>(&vec![7; rank.world_size()]);
    rank.all_to_all_counted(AllToAllCounted {
        input: (&input).into(),
        send_counts: (&send_counts).into(),
        send_offsets: offsets.as_ref().map(|offsets| offsets.into()),
        output: (&mut output).into(),
        recv_counts: (&mut recv_counts).into(),
    })
    .unwrap();
    let told: Vec<usize> = recv_counts.into_iter().map(|count| count.try_into().ok().unwrap()).collect();
    assert_eq!(told, table.column(me), "{name} on rank {me}");
    assert!(output == table.output(me, share), "{name} on rank {me}");
}

#[test]
fn every_rank_gets_what_the_counts_of_others_say_and_is_told_how_much() {
    let seed = random::seed();
    for ranks in [1, 2, 3, 5, 9] {
        on_threads(ranks, move |rank| {
            for (turn, most) in [0, 1, 40, 5000, 60_000, 3].into_iter().enumerate() {
                let table = Table::new(ranks, most, turn % 2 == 1, seed + turn as u64);
                let name = format!("turn {turn} of {ranks} ranks, UNISONO_TEST_SEED={seed}");
                check::<u32>(&rank, &table, &name);
                check::<u64>(&rank, &table, &name);
            }
            rank.destroy().unwrap();
        });
    }
}

#[test]
fn calls_in_flight_and_windows_serve_too() {
    on_threads(3, |rank| {
        let (me, table) = (rank.rank(), Table::new(3, 20_000, true, 11));
        let share = 20_000;
        let (input, counts) = (table.input(me), numbers::<u64>(&table.counts[me]));
        let offsets = numbers::<u64>(&table.offsets.as_ref().unwrap()[me]);
        let mut output = rank.window::<u32>(3 * share, Memory::Host).unwrap();
        output.lend().unwrap().fill(POISON);
        let mut told = [0u64; 3];
        rank.scope(|scope| {
            let call = AllToAllCounted {
                input: (&input).into(),
                send_counts: (&counts).into(),
                send_offsets: Some((&offsets).into()),
                output: output.range_mut(0..3 * share),
                recv_counts: (&mut told).into(),
            };
            scope.all_to_all_counted(call)?.wait()
        })
        .unwrap();
        assert_eq!(told.map(|count| count as usize).to_vec(), table.column(me));
        assert!(output.lend().unwrap() == table.output(me, share));
        output.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_sent() {
    on_threads(2, |rank| {
        let (me, input, mut output, mut told) = (rank.rank(), [1u16; 10], [7u16; 8], [9u32; 2]);
        let mut complaint = |input: &[u16], counts: &[u32], offsets: Option<&[u32]>, room: usize| {
            let result = rank.all_to_all_counted(AllToAllCounted {
                input: input.into(),
                send_counts: counts.into(),
                send_offsets: offsets.map(Into::into),
                output: (&mut output[..room]).into(),
                recv_counts: (&mut told).into(),
            });
            match result.unwrap_err() {
                Error::Argument { call: "all_to_all_counted", rank, what, expected, got } => {
                    assert_eq!(rank, me);
                    (what, expected, got)
                }
                error => panic!("{error}"),
            }
        };
        let refused = |what, expected: &str, got: &str| (what, expected.to_owned(), got.to_owned());
        let counts = refused("send counts", "2 of u32", "3 of u32");
        assert_eq!(complaint(&input, &[1, 2, 3], None, 8), counts);
        let offsets = refused("send offsets", "2 of u32", "1 of u32");
        assert_eq!(complaint(&input, &[1, 2], Some(&[0]), 8), offsets);
        let room = refused("count of the output", "a multiple of 2", "7");
        assert_eq!(complaint(&input, &[1, 2], None, 7), room);
        let outside = refused("parts of the input", "within 10 elements", "6 from 5 for rank 1");
        assert_eq!(complaint(&input, &[5, 6], None, 8), outside);
        assert_eq!(complaint(&input, &[1, 6], Some(&[9, 5]), 8), outside);
        let far = refused("parts of the input", "within 10 elements", "0 from 11 for rank 0");
        assert_eq!(complaint(&input, &[0, 6], Some(&[11, 0]), 8), far);
        assert_eq!((output, told), ([7; 8], [9; 2]));
        // Nothing was sent: both still make their first call.
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_part_that_has_no_room_is_told_with_both_ranks_and_nothing_is_written() {
    let results = on_threads(3, |rank| {
        let (me, input) = (rank.rank(), [3u8; 30]);
        // Rank 1 sends 8 to rank 2, which has room for 7.
        let counts = [[5u32, 5, 5], [5, 5, 8], [5, 5, 5]][me];
        let (mut output, mut told) = (vec![9u8; 3 * [20, 20, 7][me]], [77u32; 3]);
        let call = AllToAllCounted {
            input: (&input).into(),
            send_counts: (&counts).into(),
            send_offsets: None,
            output: (&mut output).into(),
            recv_counts: (&mut told).into(),
        };
        let error = rank.all_to_all_counted(call).and_then(|()| rank.barrier()).unwrap_err();
        (error, output, told)
    });
    for (me, (error, output, told)) in results.into_iter().enumerate() {
        let Error::Counts { during, from: 1, to: 2, needed: 8, room: 7, is_input: false } = &error else {
            panic!("{error}")
        };
        assert_eq!(during, "all_to_all_counted #1");
        assert!(me != 2 || (output == [9; 21] && told == [77; 3]), "{output:?} {told:?}");
    }
}
