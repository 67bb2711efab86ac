//! Collectives with parts of any size, and on several buffers of each rank: random calls back to back, with gaps and in any
//! order, in place where that is allowed; then what is refused, and ranks that disagree.

use std::fmt::Debug;
use std::sync::Arc;
use std::thread;

use unisono::{BufMut, Communicator, Counts, Error, Operations, ReduceOp, Reducible};
use unisono_core::layout::CHUNK_BYTES;

/// Runs `body` on every rank of a world of threads; what each returned, by rank.
fn on_threads<T: Send + 'static>(
    world_size: usize,
    body: impl Fn(Communicator) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let body = Arc::new(body);
    let threads: Vec<_> = Communicator::threads(world_size)
        .unwrap()
        .into_iter()
        .map(|rank| {
            let body = body.clone();
            thread::spawn(move || body(rank))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// Numbers that follow from a seed.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

fn seed() -> u64 {
    let seed = std::env::var("UNISONO_TEST_SEED").ok().and_then(|text| text.parse().ok());
    seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 41)
}

/// An element that tests can make and add.
trait Number: Reducible + PartialEq + Debug {
    const POISON: Self;
    fn of(bits: u64) -> Self;
    fn plus(self, other: Self) -> Self;
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Number for $type {
            const POISON: Self = 0x5a;
            fn of(bits: u64) -> Self {
                bits as Self
            }
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
        }
    )*};
}
number!(u8, i16, u32, i64);

/// Part `part` of what `rank` puts into call `number`.
fn content<T: Number>(number: u64, rank: usize, part: usize, count: usize) -> Vec<T> {
    let mut random = Random(number << 32 | (rank as u64) << 16 | part as u64);
    (0..count).map(|_| T::of(random.next())).collect()
}

/// Parts in a buffer: in order, or anywhere with gaps.
struct Spread {
    counts: Vec<usize>,
    offsets: Option<Vec<usize>>,
    room: usize,
}

impl Spread {
    fn new(counts: &[usize], random: &mut Random) -> Self {
        let counts = counts.to_vec();
        if random.below(2) == 0 {
            return Self { room: counts.iter().sum(), counts, offsets: None };
        }
        let mut order: Vec<usize> = (0..counts.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at + 1));
        }
        let (mut offsets, mut room) = (vec![0; counts.len()], random.below(5));
        for rank in order {
            offsets[rank] = room;
            room += counts[rank] + random.below(20);
        }
        Self { counts, offsets: Some(offsets), room }
    }

    fn start(&self, rank: usize) -> usize {
        match &self.offsets {
            Some(offsets) => offsets[rank],
            None => self.counts[..rank].iter().sum(),
        }
    }

    fn view(&self) -> Counts<'_> {
        Counts { counts: &self.counts, offsets: self.offsets.as_deref() }
    }

    /// A buffer with these parts, and poison between them.
    fn fill<T: Number>(&self, part: impl Fn(usize) -> Vec<T>) -> Vec<T> {
        let mut buffer = vec![T::POISON; self.room];
        for (rank, count) in self.counts.iter().enumerate() {
            buffer[self.start(rank)..self.start(rank) + count].copy_from_slice(&part(rank));
        }
        buffer
    }
}

fn sizes(random: &mut Random, number: usize, world_size: usize, size: usize) -> Vec<usize> {
    let border = (CHUNK_BYTES / world_size / size).max(2);
    let one = |random: &mut Random| match random.below(10) {
        0 => 0,
        1 => border - 1 + random.below(3),
        2 => CHUNK_BYTES / size + random.below(3),
        3 => random.below(3 * border),
        _ => random.below(100),
    };
    (0..number).map(|_| one(random)).collect()
}

fn reduced<T: Number>(world_size: usize, input: impl Fn(usize) -> Vec<T>) -> Vec<T> {
    (1..world_size).fold(input(0), |sum, rank| {
        sum.into_iter().zip(input(rank)).map(|(left, right)| left.plus(right)).collect()
    })
}

/// One random call with parts of any size.
fn uneven_call<T: Number>(rank: &Communicator, number: u64, shared: &mut Random, own: &mut Random) {
    let (me, world_size) = (rank.rank(), rank.world_size());
    let counts = sizes(shared, world_size, world_size, size_of::<T>());
    let (kind, root) = (shared.below(5), shared.below(world_size));
    let all = Spread::new(&counts, own);
    let told = || format!("kind {kind}, {counts:?}, root {root}, rank {me}, call {number}");
    let mine = || content::<T>(number, me, 0, counts[me]);
    let at_home = all.start(me)..all.start(me) + counts[me];
    match kind {
        0 | 1 => {
            let expected = all.fill(|from| content(number, from, 0, counts[from]));
            let is_target = kind == 0 || me == root;
            let mut target = vec![T::POISON; if is_target { all.room } else { 0 }];
            if is_target && own.below(2) == 0 {
                // Our own part already lies in its place.
                target[at_home.clone()].copy_from_slice(&mine());
            }
            let result = match kind {
                0 => rank.all_gather_v(&mine(), &mut target, all.view()),
                _ => rank.gather_v(&mine(), &mut target, all.view(), root),
            };
            result.unwrap_or_else(|error| panic!("{}: {error}", told()));
            assert!(!is_target || target == expected, "{}", told());
        }
        2 | 3 => {
            let is_source = kind == 2 || me == root;
            let source = match is_source {
                true => all.fill(|to| content(number, me, to + 1, counts[to])),
                false => Vec::new(),
            };
            let mut target = vec![T::POISON; counts[me]];
            let input = |from| content::<T>(number, from, me + 1, counts[me]);
            let (result, expected) = match kind {
                2 => {
                    let result = rank.reduce_scatter_v(&source, &mut target, all.view(), ReduceOp::Sum);
                    (result, reduced(world_size, input))
                }
                _ => (rank.scatter_v(&source, &mut target, all.view(), root), input(root)),
            };
            result.unwrap_or_else(|error| panic!("{}: {error}", told()));
            assert!(target == expected, "{}", told());
        }
        _ => all_to_all_v::<T>(rank, number, shared, own),
    }
}

fn all_to_all_v<T: Number>(rank: &Communicator, number: u64, shared: &mut Random, own: &mut Random) {
    let (me, world_size) = (rank.rank(), rank.world_size());
    let table: Vec<Vec<usize>> =
        (0..world_size).map(|_| sizes(shared, world_size, world_size, size_of::<T>())).collect();
    let column: Vec<usize> = table.iter().map(|row| row[me]).collect();
    let (out, into) = (Spread::new(&table[me], own), Spread::new(&column, own));
    let source = out.fill(|to| content::<T>(number, me, to + 1, table[me][to]));
    let mut target = vec![T::POISON; into.room];
    rank.all_to_all_v(&source, out.view(), &mut target, into.view())
        .unwrap_or_else(|error| panic!("{table:?}, rank {me}, call {number}: {error}"));
    let expected = into.fill(|from| content(number, from, me + 1, table[from][me]));
    assert!(target == expected, "{table:?}, rank {me}, call {number}");
}

/// One random call on several buffers of each rank.
fn multi_call<T: Number>(rank: &Communicator, number: u64, shared: &mut Random, own: &mut Random) {
    let (me, world_size) = (rank.rank(), rank.world_size());
    let (root, width) = (shared.below(world_size), 1 + shared.below(4));
    let count = sizes(shared, 1, width, size_of::<T>())[0];
    let reduces = shared.below(2) == 0;
    // A broadcast may go to any number of buffers; the root has at least those that all agree on.
    let local = if reduces { width } else { width + own.below(3) };
    let root_buffer = shared.below(width);
    let mut buffers: Vec<Vec<T>> = (0..local).map(|part| content(number, me, part, count)).collect();
    let all: Vec<BufMut<'_, T>> = buffers.iter_mut().map(BufMut::from).collect();
    let (result, expected) = if reduces {
        let input = |at: usize| content::<T>(number, at / width, at % width, count);
        (rank.all_reduce_multi(all, ReduceOp::Sum), reduced(world_size * width, input))
    } else {
        (rank.broadcast_multi(all, root, root_buffer), content(number, root, root_buffer, count))
    };
    result.unwrap_or_else(|error| panic!("rank {me}, call {number}: {error}"));
    for buffer in &buffers {
        assert!(*buffer == expected, "rank {me} of {world_size}, call {number}, {count} × {local}");
    }
}

fn random_calls(world_size: usize, calls: u64) {
    let seed = seed();
    on_threads(world_size, move |rank| {
        let (mut shared, mut own) = (Random(seed), Random(seed ^ (rank.rank() as u64 + 1) << 40));
        for number in 0..calls {
            let call = match shared.below(8) {
                0 => uneven_call::<u8>,
                1 => uneven_call::<i16>,
                2 | 3 => uneven_call::<u32>,
                4 | 5 => uneven_call::<i64>,
                6 => multi_call::<u8>,
                _ => multi_call::<i64>,
            };
            call(&rank, number, &mut shared, &mut own);
            if shared.below(5) == 0 {
                rank.all_reduce(&mut [1u32], ReduceOp::Sum).unwrap();
            }
        }
        rank.destroy().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    });
}

#[test]
fn one_rank() {
    random_calls(1, 100);
}

#[test]
fn two_ranks() {
    random_calls(2, 200);
}

#[test]
fn three_ranks() {
    random_calls(3, 150);
}

#[test]
fn six_ranks() {
    random_calls(6, 80);
}

#[test]
fn seventeen_ranks() {
    random_calls(17, 15);
}

#[test]
fn what_fits_into_no_chunk_is_exchanged_in_place() {
    on_threads(2, |rank| {
        let me = rank.rank();
        // Both send each other the same large amounts, and keep another one.
        let counts = [[700_001usize, 900_007], [900_007, 3]][me];
        let part = |from: usize, to: usize| {
            content::<i16>(
                1,
                from,
                to,
                if from == 0 && to == 0 {
                    700_001
                } else if from == to {
                    3
                } else {
                    900_007
                },
            )
        };
        let mut x = [part(me, 0), part(me, 1)].concat();
        let raw = BufMut::from(&mut x).raw();
        // SAFETY: input and output are the same vector, which nobody else touches until the call returns.
        let call = unsafe {
            let (kind, view) = (unisono::Kind::AllToAllV, Counts::from(&counts));
            unisono::Call::from_raw(kind, &[raw, raw], &[view, view])
        };
        rank.submit(call).unwrap();
        assert!(x == [part(0, me), part(1, me)].concat());
        rank.destroy().unwrap();
    });
}

/// The argument that is complained about.
fn complaint(result: unisono::Result<()>) -> (&'static str, String, String) {
    match result.unwrap_err() {
        Error::Argument { what, expected, got, .. } => (what, expected, got),
        error => panic!("{error}"),
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    on_threads(2, |rank| {
        let (me, mine, mut all) = (rank.rank(), [1u32; 3], [7u32; 8]);
        let fits: [usize; 2] = [[3, 4], [4, 3]][me];
        let (what, _, got) = complaint(rank.all_gather_v(&mine, &mut all, &[3, 3, 2]));
        assert_eq!((what, got.as_str()), ("parts of the output", "3"));
        let (what, expected, got) = complaint(rank.all_gather_v(&mine, &mut all, &[3, 6]));
        assert_eq!((what, expected.as_str()), ("parts of the output", "within 8 elements"));
        assert_eq!(got, "6 from 3 for rank 1");
        let (_, _, got) = complaint(rank.all_gather_v(&mine, &mut all, &[usize::MAX, 3]));
        assert!(got.contains("for rank 0"), "{got}");
        let overlapping = Counts { counts: &fits, offsets: Some(&[2, 1]) };
        let (what, expected, got) = complaint(rank.all_gather_v(&mine, &mut all, overlapping));
        assert_eq!((what, expected.as_str()), ("parts of the output", "disjoint ones"));
        assert_eq!(got, "two that overlap at element 2");
        let (what, expected, got) = complaint(rank.all_gather_v(&mine, &mut all, &[2, 2]));
        assert_eq!((what, expected.as_str(), got.as_str()), ("count of the input", "2", "3"));
        let (what, expected, got) = complaint(rank.gather_v(&mine, &mut all, &fits, 2));
        assert_eq!((what, expected.as_str(), got.as_str()), ("root", "below 2", "2"));
        let (what, ..) = complaint(rank.all_to_all_v(&all.clone(), &[1, 8], &mut all, &[1, 1]));
        assert_eq!(what, "parts of the input");
        let (what, ..) = complaint(rank.all_reduce_multi(Vec::<BufMut<'_, u32>>::new(), ReduceOp::Sum));
        assert_eq!(what, "number of buffers");
        let (mut short, mut long) = ([0u32; 3], [0u32; 4]);
        let both = vec![BufMut::from(&mut short), BufMut::from(&mut long)];
        let (what, expected, got) = complaint(rank.broadcast_multi(both, 0, 0));
        assert_eq!(
            (what, expected.as_str(), got.as_str()),
            ("count", "3 of u32 in every buffer", "4 of u32 in buffer 1")
        );
        if me == 0 {
            let (what, expected, got) = complaint(rank.broadcast_multi(vec![BufMut::from(&mut short)], 0, 1));
            assert_eq!((what, expected.as_str(), got.as_str()), ("root buffer", "below 1", "1"));
        }
        assert_eq!(all, [7; 8]);
        // Nothing was sent: both still make their first call.
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn ranks_that_disagree_about_sizes_are_told_both() {
    let errors = on_threads(2, |rank| {
        let me = rank.rank();
        let (source, mut target) = ([1u8; 10], [0u8; 10]);
        let (out, into) = [([1, 2], [1, 4]), ([3, 1], [2, 1])][me];
        rank.all_to_all_v(&source, &out, &mut target, &into)
            .and_then(|()| rank.barrier())
            .unwrap_err()
            .to_string()
    });
    for error in errors {
        assert!(error.contains("4 from rank 1") && error.contains("3 to rank 0"), "{error}");
    }
    let errors = on_threads(2, |rank| {
        let mine = vec![0u8; 2 + rank.rank()];
        let counts = [[2, 3], [3, 3]][rank.rank()];
        rank.all_gather_v(&mine, &mut vec![0u8; 6], &counts).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("all_gather_v #1 on rank 0 (u8, 5 in parts #"), "{error}");
        assert!(error.contains("all_gather_v #1 on rank 1 (u8, 6 in parts #"), "{error}");
    }
    let errors = on_threads(2, |rank| {
        let (mut a, mut b) = ([0u8; 2], [0u8; 2]);
        let mut both = vec![BufMut::from(&mut a), BufMut::from(&mut b)];
        both.truncate(1 + rank.rank());
        rank.all_reduce_multi(both, ReduceOp::Max).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("max, 1 buffer)") && error.contains("max, 2 buffers"), "{error}");
    }
}
