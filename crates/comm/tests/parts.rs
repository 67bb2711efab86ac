//! The collectives whose buffers have a part for each rank, or that only a root reads or writes: reduce, reduce_scatter, gather,
//! scatter and all_to_all. Random calls back to back, every dtype and reduction, sizes around the borders of chunks and
//! pieces, in place and not, at odd addresses; every byte is compared with the scalar reference.

use std::sync::Arc;
use std::thread;

use unisono::reduce_op::{is_supported, reference};
use unisono::{Call, Communicator, DType, Error, Kind, Operations, Place, RawBuffer, ReduceOp};
use unisono_core::layout::{CHUNK_BYTES, CHUNKS};

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

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// What a buffer holds before a call, and must still hold where the call does not write.
const POISON: u8 = 0xa5;

/// Bytes at an odd address, with guards on both sides.
struct Region {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Region {
    fn new(length: usize, shift: usize) -> Self {
        Self { bytes: vec![POISON; length + 64], start: 16 + shift, length }
    }

    fn content(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }

    fn is_guarded(&self) -> bool {
        let (before, rest) = self.bytes.split_at(self.start);
        before.iter().chain(&rest[self.length..]).all(|byte| *byte == POISON)
    }

    /// `bytes` from `at`, as elements.
    fn raw(&mut self, at: usize, bytes: usize, dtype: DType) -> RawBuffer {
        let ptr = self.content()[at..at + bytes].as_mut_ptr().expose_provenance() as u64;
        RawBuffer { ptr, count: bytes / dtype.size(), dtype, place: Place::Host }
    }
}

/// One call of all ranks.
#[derive(Clone, Copy, Debug)]
struct Case {
    number: u64,
    kind: Kind,
    dtype: DType,
    /// Elements of one part.
    count: usize,
    in_place: bool,
}

/// Draws a case, equally on all ranks.
fn draw(random: &mut Random, number: u64, world_size: usize) -> Case {
    let dtype = random.pick(&DType::ALL);
    let ops: Vec<ReduceOp> = ReduceOp::ALL.into_iter().filter(|op| is_supported(dtype, *op)).collect();
    let (op, root) = (random.pick(&ops), random.below(world_size) as u32);
    let kind = random.pick(&[
        Kind::Reduce { op, root },
        Kind::ReduceScatter { op },
        Kind::Gather { root },
        Kind::Scatter { root },
        Kind::AllToAll,
        Kind::AllReduce { op },
        Kind::Broadcast { root },
    ]);
    let piece = ((CHUNK_BYTES / world_size) & !63) / dtype.size();
    let chunk = CHUNK_BYTES / dtype.size();
    let border = random.pick(&[piece, 2 * piece, CHUNKS * piece, chunk, 3 * chunk]) + random.below(3) - 1;
    let count = match random.below(12) {
        0 => border,
        1 | 2 => random.below(5000),
        _ => random.pick(&[0, 1, 2, 3, 7, 16, 17, 31, 48, 49, 64, 257]),
    };
    Case { number, kind, dtype, count, in_place: random.below(2) == 0 }
}

/// Parts of the input and of the output that `rank` has.
fn sides(kind: Kind, rank: usize, world_size: usize) -> (usize, usize) {
    let at_root = |parts| if kind.root() == Some(rank as u32) { parts } else { 0 };
    match kind {
        Kind::Reduce { .. } => (1, at_root(1)),
        Kind::ReduceScatter { .. } => (world_size, 1),
        Kind::Gather { .. } => (1, at_root(world_size)),
        Kind::Scatter { .. } => (at_root(world_size), 1),
        Kind::AllToAll => (world_size, world_size),
        _ => (1, 1),
    }
}

/// What `rank` puts in: `parts` parts of the case.
fn input(seed: u64, case: &Case, rank: usize, parts: usize) -> Vec<u8> {
    let mut random = Random(seed ^ case.number << 20 ^ (rank as u64) << 8);
    let bytes = case.count * case.dtype.size() * parts;
    (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).take(bytes).collect()
}

/// What `rank` must get.
fn expected(seed: u64, case: &Case, rank: usize, world_size: usize) -> Vec<u8> {
    let part = case.count * case.dtype.size();
    let inputs: Vec<Vec<u8>> =
        (0..world_size).map(|from| input(seed, case, from, sides(case.kind, from, world_size).0)).collect();
    let own = |all: &Vec<u8>| all[rank * part..(rank + 1) * part].to_vec();
    let reduce = |inputs: Vec<Vec<u8>>, op| {
        let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        let scalars: Vec<f64> = (0..world_size).map(|rank| 0.5 + rank as f64).collect();
        let mut output = vec![0; inputs[0].len()];
        reference(case.dtype, op, &inputs, &scalars, &mut output).unwrap();
        output
    };
    match case.kind {
        Kind::Reduce { op, .. } | Kind::AllReduce { op } => reduce(inputs, op),
        Kind::ReduceScatter { op } => reduce(inputs.iter().map(own).collect(), op),
        Kind::Gather { .. } => inputs.concat(),
        Kind::Scatter { root } => own(&inputs[root as usize]),
        Kind::AllToAll => inputs.iter().flat_map(own).collect(),
        Kind::Broadcast { root } => inputs[root as usize].clone(),
        kind => panic!("{kind:?}"),
    }
}

/// The kind as this rank submits it: every rank has its own scalar of a pre-multiplied sum.
fn of_rank(kind: Kind, rank: usize) -> Kind {
    let own = |op| match op {
        ReduceOp::PreMulSum(_) => ReduceOp::PreMulSum(0.5 + rank as f64),
        op => op,
    };
    match kind {
        Kind::Reduce { op, root } => Kind::Reduce { op: own(op), root },
        Kind::ReduceScatter { op } => Kind::ReduceScatter { op: own(op) },
        Kind::AllReduce { op } => Kind::AllReduce { op: own(op) },
        kind => kind,
    }
}

fn submit(rank: &Communicator, kind: Kind, buffers: &[RawBuffer]) -> unisono::Result<()> {
    // SAFETY: the buffers belong to regions of the caller, which nobody else touches until the call returns, and host calls
    // are complete on return.
    rank.submit(unsafe { Call::from_raw(kind, buffers, &[]) })
}

/// Runs one case on this rank and compares everything.
fn run(rank: &Communicator, seed: u64, case: &Case, own: &mut Random) {
    let (me, world_size) = (rank.rank(), rank.world_size());
    let part = case.count * case.dtype.size();
    let (sources, targets) = sides(case.kind, me, world_size);
    let (sent, kind) = (input(seed, case, me, sources), of_rank(case.kind, me));
    let told = |what: &str| format!("{what}: rank {me} of {world_size}, {case:?}, seed {seed}");
    let two_sided = matches!(kind, Kind::Gather { .. } | Kind::Scatter { .. });
    let mut source = Region::new(sent.len(), own.below(16));
    source.content().copy_from_slice(&sent);
    // Where this rank has no part in the result: nothing, or a buffer that must stay as it is.
    let idle = if own.below(2) == 0 { 0 } else { part };
    let mut target = Region::new(if targets > 0 { part * targets } else { idle }, own.below(16));
    let got = if case.in_place && !two_sided {
        let whole = source.raw(0, sent.len(), case.dtype);
        submit(rank, kind, &[whole]).unwrap_or_else(|error| panic!("{}: {error}", told("in place")));
        match kind {
            Kind::ReduceScatter { .. } => {
                for other in (0..world_size).filter(|other| *other != me) {
                    let range = other * part..(other + 1) * part;
                    assert!(source.content()[range.clone()] == sent[range], "{}", told("other parts"));
                }
                source.content()[me * part..(me + 1) * part].to_vec()
            }
            _ => source.content().to_vec(),
        }
    } else if case.in_place && targets == world_size && matches!(kind, Kind::Gather { .. }) {
        // The root's own part already lies in the result.
        target.content()[me * part..(me + 1) * part].copy_from_slice(&sent);
        let (mine, all) =
            (target.raw(me * part, part, case.dtype), target.raw(0, part * world_size, case.dtype));
        submit(rank, kind, &[mine, all]).unwrap_or_else(|error| panic!("{}: {error}", told("at home")));
        target.content().to_vec()
    } else if case.in_place && sources == world_size && matches!(kind, Kind::Scatter { .. }) {
        let (all, mine) = (source.raw(0, sent.len(), case.dtype), source.raw(me * part, part, case.dtype));
        submit(rank, kind, &[all, mine]).unwrap_or_else(|error| panic!("{}: {error}", told("at home")));
        assert!(source.content() == sent, "{}", told("input"));
        source.content()[me * part..(me + 1) * part].to_vec()
    } else {
        let length = target.length;
        let buffers = [source.raw(0, sent.len(), case.dtype), target.raw(0, length, case.dtype)];
        submit(rank, kind, &buffers).unwrap_or_else(|error| panic!("{}: {error}", told("out of place")));
        assert!(source.content() == sent, "{}", told("input"));
        target.content().to_vec()
    };
    assert!(source.is_guarded() && target.is_guarded(), "{}", told("guards"));
    if targets > 0 {
        assert!(got == expected(seed, case, me, world_size), "{}", told("result"));
    } else if case.in_place && !two_sided {
        assert!(got == sent, "{}", told("buffer of a rank that gets nothing"));
    } else {
        assert!(target.content().iter().all(|byte| *byte == POISON), "{}", told("idle output"));
    }
}

/// Runs `body` on every rank of a world of threads.
fn on_threads(world_size: usize, body: impl Fn(Communicator) + Send + Sync + 'static) {
    let body = Arc::new(body);
    let start = |rank| {
        let body = body.clone();
        thread::spawn(move || body(rank))
    };
    let threads: Vec<_> = Communicator::threads(world_size).unwrap().into_iter().map(start).collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn random_calls(world_size: usize, calls: u64) {
    let seed = std::env::var("UNISONO_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 24);
    on_threads(world_size, move |rank| {
        let (mut shared, mut own) = (Random(seed), Random(seed ^ (rank.rank() as u64 + 1)));
        for number in 0..calls {
            let case = draw(&mut shared, number, rank.world_size());
            run(&rank, seed, &case, &mut own);
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn one_rank_has_all_parts() {
    random_calls(1, 300);
}

#[test]
fn two_ranks_get_their_parts() {
    random_calls(2, 900);
}

#[test]
fn three_ranks_get_their_parts() {
    random_calls(3, 900);
}

#[test]
fn five_ranks_get_their_parts() {
    random_calls(5, 600);
}

#[test]
fn sixteen_ranks_get_their_parts() {
    random_calls(16, 150);
}

#[test]
fn sixty_four_mebibytes_and_a_byte_are_gathered_scattered_and_reduced() {
    on_threads(2, |rank| {
        let mut own = Random(7);
        let count = (64 << 20) + 1;
        let kinds = [
            Kind::Reduce { op: ReduceOp::BitXor, root: 1 },
            Kind::ReduceScatter { op: ReduceOp::Sum },
            Kind::Gather { root: 0 },
            Kind::Scatter { root: 1 },
            Kind::AllToAll,
        ];
        for (number, kind) in (0..).zip(kinds) {
            let case = Case { number, kind, dtype: DType::U8, count, in_place: number % 2 == 0 };
            run(&rank, 5, &case, &mut own);
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn arguments_that_do_not_fit_are_refused_and_nothing_is_written() {
    on_threads(3, |rank| {
        let me = rank.rank();
        let refused = |result: Result<(), Error>, expected: &str| {
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::Argument { rank, .. } if *rank == me), "{error:?}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        let mut four = [7u32; 4];
        refused(rank.all_to_all(&mut four), "count should be a multiple of 3, got 4");
        refused(rank.reduce_scatter(&mut four, ReduceOp::Sum), "count should be a multiple of 3, got 4");
        refused(rank.reduce(&mut four, ReduceOp::Sum, 3), "root should be below 3, got 3");
        refused(rank.scatter(&[0u32; 12], &mut four, usize::MAX), "root should be below 3");
        refused(rank.all_to_all_into(&[0u32; 3], &mut four), "count of the output should be 3, got 4");
        refused(
            rank.reduce_scatter_into(&[0u32; 11], &mut four, ReduceOp::Sum),
            "count of the input should be 12, got 11",
        );
        if me == 1 {
            refused(rank.gather(&[0u32; 4], &mut [0u32; 11], 1), "count of the output should be 12, got 11");
            refused(rank.scatter(&[0u32; 11], &mut four, 1), "count of the input should be 12, got 11");
        }
        let mut region = Region::new(40, 0);
        let one = [region.raw(0, 12, DType::F32)];
        refused(submit(&rank, Kind::Gather { root: 0 }, &one), "number of buffers should be 2, got 1");
        let overlapping = [region.raw(0, 36, DType::F32), region.raw(4, 36, DType::F32)];
        refused(submit(&rank, Kind::AllToAll, &overlapping), "a partial overlap");
        let misplaced = [region.raw(0, 36, DType::F32), region.raw(((me + 1) % 3) * 12, 12, DType::F32)];
        refused(submit(&rank, Kind::ReduceScatter { op: ReduceOp::Sum }, &misplaced), "a partial overlap");
        let floats = rank.reduce(&mut [0f32; 4], ReduceOp::BitAnd, 0);
        assert!(matches!(floats, Err(Error::Core(unisono_core::Error::Unsupported { .. }))), "{floats:?}");
        assert_eq!(four, [7; 4]);
        assert!(region.content().iter().all(|byte| *byte == POISON));
        rank.all_reduce(&mut four, ReduceOp::Sum).unwrap();
        assert_eq!(four, [21; 4]);
        rank.destroy().unwrap();
    });
}

#[test]
fn ranks_that_disagree_on_the_root_or_the_operation_are_told_both_calls() {
    on_threads(2, |rank| {
        let error = match rank.rank() {
            0 => rank.reduce(&mut [1u8; 3], ReduceOp::Sum, 0).unwrap_err(),
            _ => {
                let first = rank.gather(&[1u8; 3], &mut [0u8; 6], 1);
                first.and_then(|()| rank.barrier()).unwrap_err()
            }
        };
        let text = error.to_string();
        assert!(text.contains("reduce #1 on rank 0 (u8, 3, sum, root 0)"), "{text}");
        assert!(text.contains("gather #1 on rank 1 (u8, 3, root 1)"), "{text}");
    });
}
