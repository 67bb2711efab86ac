//! Random operations, each compared on the device with what the scalar reference says, bit for bit, in strict rank order.
//!
//! Inputs repeat with a prime period, so the reference reduces one period for each (dtype, reduction), and a kernel compares
//! any range of an output with it. Nothing goes to the host but a count of differences. The seed is printed; `UNISONO_TEST_SEED`
//! repeats a run, `UNISONO_TEST_SCALE=50` makes it fifty times as long.

use std::collections::HashMap;

use unisono::cuda::{Architecture, Cache, Compiler, DeviceBuffer, Function, Grid, Module, Source};
use unisono::{Builder, Call, Counts, DType, Form, Kind, Operations, Order, Place, RawBuffer, ReduceOp};

use crate::case::{Case, Operation, scalar};
use crate::numbers::{self, Random};
use crate::pairs;
use crate::random_more::{self, More};
use crate::world::{World, devices};

/// Elements after which inputs repeat.
pub(crate) const PERIOD: usize = 1021;
/// Bytes of each input and output, without the room for large ones.
const ROOM: usize = 2 << 20;
const LARGE: usize = 96 << 20;
/// Those of large calls.
const LARGE_ONES: [(DType, ReduceOp); 2] = [(DType::BF16, ReduceOp::Sum), (DType::F32, ReduceOp::Sum)];

const COMPARE: &str = r#"
struct Args { const unsigned char* got; const unsigned char* expected; unsigned long long period, phase, bytes; unsigned long long* wrong; };
extern "C" __global__ void compare(const Args args) {
  unsigned long long step = (unsigned long long)gridDim.x * blockDim.x, wrong = 0;
  for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < args.bytes; i += step)
    wrong += args.got[i] != args.expected[(args.phase + i) % args.period];
  if (wrong) atomicAdd(args.wrong, wrong);
}"#;

#[repr(C)]
struct Compare {
    got: u64,
    expected: u64,
    period: u64,
    phase: u64,
    bytes: u64,
    wrong: u64,
}

/// Log-uniform up to `most`, zero among them.
pub(crate) fn size(random: &mut Random, most: usize) -> usize {
    let bits = random.below(most.ilog2() + 1);
    random.below(1 << bits << u32::from(bits < most.ilog2())).min(most)
}

pub(crate) struct Rank {
    /// Inputs by dtype.
    pub(crate) inputs: HashMap<DType, DeviceBuffer>,
    pub(crate) target: DeviceBuffer,
    /// A period of each input, by dtype and rank, and of each reduction.
    pub(crate) parts: HashMap<(DType, usize), DeviceBuffer>,
    sums: HashMap<(DType, u8), DeviceBuffer>,
    wrong: DeviceBuffer,
    compare: Function,
}

fn period(dtype: DType, rank: usize) -> Vec<u8> {
    let mut random = Random::new(rank as u64 * 77 + u64::from(dtype.code()) + 5);
    let words = (0..(PERIOD * dtype.size()).div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(PERIOD * dtype.size()).collect()
}

impl Rank {
    fn new(world: &World, rank: usize, reductions: &[(DType, ReduceOp)]) -> Self {
        let device = &world.devices[rank];
        let upload = |bytes: &[u8]| {
            let mut buffer = DeviceBuffer::new(device, bytes.len()).unwrap();
            buffer.write(0, bytes).unwrap();
            buffer
        };
        let ranks = world.ranks.len();
        let (mut inputs, mut parts, mut sums) = (HashMap::new(), HashMap::new(), HashMap::new());
        for dtype in DType::ALL {
            let mine = period(dtype, rank);
            // Only some have the room for large calls.
            let room = if matches!(dtype, DType::BF16 | DType::F32) { LARGE } else { ROOM };
            let times = room.div_ceil(mine.len()) + 1;
            inputs.insert(dtype, upload(&mine.repeat(times)));
            for peer in 0..ranks {
                parts.insert((dtype, peer), upload(&period(dtype, peer)));
            }
        }
        for (dtype, op) in reductions.iter().copied() {
            let all: Vec<Vec<u8>> = (0..ranks).map(|rank| period(dtype, rank)).collect();
            let all: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
            let scalars: Vec<f64> = (0..ranks).map(scalar).collect();
            let mut sum = vec![0; PERIOD * dtype.size()];
            unisono::reduce_op::reference(dtype, op, &all, &scalars, &mut sum).unwrap();
            sums.insert((dtype, op.code()), upload(&sum));
        }
        let source =
            Source { name: "compare.cu", text: COMPARE, headers: Vec::new(), definitions: Vec::new() };
        let (major, minor) = device.facts().capability;
        let cubin = Cache::of_user().cubin(&source, Architecture { major, minor }, Compiler::find).unwrap();
        let compare = Module::load(device, &cubin).unwrap().function("compare").unwrap();
        let target = DeviceBuffer::new(device, LARGE + 4096).unwrap();
        Self { inputs, target, parts, sums, wrong: upload(&[0; 8]), compare }
    }

    pub(crate) fn compare(
        &self,
        world: &World,
        rank: usize,
        (at, bytes): (u64, usize),
        expected: &DeviceBuffer,
        phase: usize,
    ) {
        let mut args = Compare {
            got: at,
            expected: expected.address(),
            period: expected.bytes() as u64,
            phase: phase as u64,
            bytes: bytes as u64,
            wrong: self.wrong.address(),
        };
        let blocks = bytes.div_ceil(4096).clamp(1, 256) as u32;
        // SAFETY: the kernel takes this structure, and reads `bytes` of the output and a period of what is expected.
        let launched = unsafe {
            self.compare.launch(
                &world.raw_streams[rank],
                Grid { blocks, threads: 256, shared_bytes: 0, is_early: false },
                (&raw mut args).cast(),
            )
        };
        launched.unwrap();
    }
}

/// One operation, the same on all ranks.
#[derive(Clone, Debug)]
enum Drawn {
    Collective(Trial),
    More(More),
}

#[derive(Clone, Copy, Debug)]
struct Trial {
    case: Case,
    /// The first element of the period that inputs begin with, and elements by which outputs miss a line.
    phase: usize,
    shift: usize,
    is_replayed: bool,
}

const OPERATIONS: [Operation; 15] = [
    Operation::AllReduce,
    Operation::AllReduce,
    Operation::AllReduce,
    Operation::ReduceScatter,
    Operation::ReduceScatter,
    Operation::Broadcast,
    Operation::AllGather,
    Operation::AllToAll,
    Operation::AllToAll,
    Operation::Reduce,
    Operation::Gather,
    Operation::Scatter,
    Operation::AllGatherV,
    Operation::ReduceScatterV,
    Operation::ReduceScatterV,
];

impl Trial {
    fn random(random: &mut Random, ranks: usize, reductions: &[(DType, ReduceOp)], is_large: bool) -> Self {
        let (mut dtype, mut op) = reductions[random.below(reductions.len())];
        if is_large {
            (dtype, op) = LARGE_ONES[random.below(LARGE_ONES.len())];
        }
        let operation = OPERATIONS[random.below(OPERATIONS.len())];
        let root = random.below(ranks);
        let case = Case { operation, dtype, op, root, ..Case::default() };
        let has_parts = !matches!(operation, Operation::AllReduce | Operation::Broadcast | Operation::Reduce);
        let room = if is_large { LARGE - (64 << 10) } else { 1 << 20 };
        let most = room / dtype.size() / if has_parts { ranks } else { 1 };
        let count = if is_large { most / 2 + random.below(most / 2) } else { size(random, most) };
        let is_in_place = random.below(3) == 0;
        Self {
            case: Case { count, is_in_place, ..case },
            phase: random.below(PERIOD),
            shift: random.below(16),
            is_replayed: random.below(8) == 0,
        }
    }

    /// Enqueues it on `rank`, and what compares its result.
    fn run(&self, world: &World, at: usize, rank: &Rank) {
        let case = &self.case;
        let size = case.dtype.size();
        let shape = case.shape(at, world.ranks.len());
        let source = rank.inputs[&case.dtype].address() + (self.phase * size) as u64;
        let target = rank.target.address() + (self.shift * size) as u64;
        let raw = |ptr| RawBuffer {
            ptr,
            count: 0,
            dtype: case.dtype,
            place: Place::Cuda { ordinal: world.devices[at].ordinal() },
        };
        let stream = &world.raw_streams[at];
        let enqueue = || {
            if shape.is_in_place {
                let begin = target + (shape.input_at * size) as u64;
                // SAFETY: both buffers are long enough, and live as long as the test.
                unsafe { stream.copy(begin, source, shape.inputs * size) }.unwrap();
            }
            let buffers = shape.buffers(raw(source), raw(target));
            // SAFETY: as above.
            let call = unsafe { Call::from_raw(case.kind(at), &buffers, &shape.views()) };
            world.ranks[at].on(&world.streams[at]).submit(call).unwrap();
        };
        // SAFETY: as above. What is not written differs.
        unsafe { stream.fill(target, 0xa5, shape.room() * size) }.unwrap();
        if self.is_replayed {
            stream.begin_capture().unwrap();
            enqueue();
            let graph = stream.end_capture().unwrap();
            graph.launch(stream).unwrap();
            graph.launch(stream).unwrap();
        } else {
            enqueue();
        }
        // Each piece of the output: whose pattern, where it begins in that, and where and how long it is.
        let (begin, mine) = (self.phase * size, (self.phase + shape.starts[at]) * size);
        let sum = rank.sums.get(&(case.dtype, case.op.code()));
        let of = |peer: usize| &rank.parts[&(case.dtype, peer)];
        let compare = |expected: &DeviceBuffer, phase: usize, (start, count): (usize, usize)| {
            let from = target + ((shape.output_at + start) * size) as u64;
            rank.compare(world, at, (from, count * size), expected, phase);
        };
        let whole = (0, shape.outputs);
        let parts = || shape.starts.iter().copied().zip(shape.counts.iter().copied()).enumerate();
        match (case.operation, sum) {
            _ if shape.outputs == 0 => {}
            (Operation::AllReduce | Operation::Reduce, Some(sum)) => compare(sum, begin, whole),
            (Operation::ReduceScatter | Operation::ReduceScatterV, Some(sum)) => compare(sum, mine, whole),
            (Operation::Broadcast, _) => compare(of(case.root), begin, whole),
            (Operation::Scatter, _) => compare(of(case.root), mine, whole),
            (Operation::AllGather | Operation::AllGatherV | Operation::Gather, _) => {
                parts().for_each(|(peer, part)| compare(of(peer), begin, part));
            }
            (Operation::AllToAll, _) => parts().for_each(|(peer, part)| compare(of(peer), mine, part)),
            _ => {}
        }
    }
}

#[test]
fn random_operations_have_the_bits_of_the_reference() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = numbers::seed();
    let scale = number("UNISONO_TEST_SCALE").unwrap_or(1);
    let operations = 2000 * scale;
    println!("UNISONO_TEST_SEED={seed}, {operations} operations");
    let mut random = Random::new(seed);
    // Compiling and loading the kernels of all takes longer than a short run; another test has each.
    let mut others: Vec<_> = pairs().filter(|pair| !LARGE_ONES.contains(pair)).collect();
    let mut reductions = LARGE_ONES.to_vec();
    while !others.is_empty() && (scale > 1 || reductions.len() < 30) {
        reductions.push(others.swap_remove(random.below(others.len())));
    }
    let world = World::new(devices.len().max(2), &devices, |builder| {
        let prepare =
            |builder: Builder, (dtype, op): &(DType, ReduceOp)| builder.prepare(*dtype, *op).unwrap();
        reductions.iter().fold(random_more::prepared(builder).order(Order::Rank), prepare)
    });
    let ranks: Vec<Rank> = (0..world.ranks.len()).map(|rank| Rank::new(&world, rank, &reductions)).collect();
    let cases = random_more::Cases::new(&world, &mut random);
    let mut recent = Vec::new();
    for number in 0..operations {
        let is_large = number % (operations / 50).max(1) == 7;
        let drawn = match random.below(3) {
            0 if !is_large => Drawn::More(More::random(&mut random, world.ranks.len())),
            _ => Drawn::Collective(Trial::random(&mut random, world.ranks.len(), &reductions, is_large)),
        };
        for (at, rank) in ranks.iter().enumerate() {
            match &drawn {
                Drawn::Collective(trial) => trial.run(&world, at, rank),
                Drawn::More(more) => more.run(&world, at, rank, &cases),
            }
        }
        recent.push(drawn);
        if number % 100 == 99 || number + 1 == operations {
            for (at, rank) in ranks.iter().enumerate() {
                world.raw_streams[at].synchronize().unwrap();
                world.ranks[at].check().unwrap_or_else(|error| panic!("{error}; seed {seed}, {recent:?}"));
                let mut wrong = [0; 8];
                rank.wrong.read(0, &mut wrong).unwrap();
                assert_eq!(u64::from_le_bytes(wrong), 0, "rank {at}, seed {seed}, among {recent:#?}");
            }
            recent.clear();
        }
    }
    world.end();
}

/// 4 GiB and more in one part, hardly anything in the other.
#[test]
fn parts_of_more_than_4_gib_arrive() {
    const COUNTS: [usize; 2] = [(4 << 30) + 12_345, 7_777];
    /// Where the second part lies in its buffer, behind a gap.
    const STARTS: [usize; 2] = [0, COUNTS[0] + 55];
    const ROOM: usize = STARTS[1] + COUNTS[1];
    let devices = devices();
    if devices.len() < 2 {
        eprintln!("SKIPPED: two GPUs are needed");
        return;
    }
    for form in [Form::Bulk, Form::Ring] {
        let world = World::new(2, &devices, |builder| {
            builder.gpu_algorithm(form, 0).prepare(DType::U8, ReduceOp::Sum).unwrap()
        });
        let reductions = [(DType::U8, ReduceOp::Sum)];
        let ranks: Vec<Rank> = (0..2).map(|rank| Rank::new(&world, rank, &reductions)).collect();
        let of = |rank| (DType::U8, rank);
        let buffers: Vec<[DeviceBuffer; 2]> = (0..2)
            .map(|at| {
                let device = &world.devices[at];
                let buffers = [ROOM, ROOM].map(|bytes| DeviceBuffer::new(device, bytes).unwrap());
                let source = buffers[0].address();
                // SAFETY: all lie in the buffers, which live as long as the test.
                unsafe {
                    let stream = &world.raw_streams[at];
                    stream.copy(source, ranks[at].parts[&of(at)].address(), PERIOD).unwrap();
                    let mut filled = PERIOD;
                    while filled < ROOM {
                        stream.copy(source + filled as u64, source, filled.min(ROOM - filled)).unwrap();
                        filled *= 2;
                    }
                    stream.fill(buffers[1].address(), 0xa5, ROOM).unwrap();
                }
                buffers
            })
            .collect();
        let counts = Counts { counts: &COUNTS, offsets: Some(&STARTS) };
        for kind in [Kind::AllGatherV, Kind::ReduceScatterV { op: ReduceOp::Sum }] {
            for (at, [source, target]) in buffers.iter().enumerate() {
                let raw = |buffer: &DeviceBuffer, count| RawBuffer {
                    ptr: buffer.address(),
                    count,
                    dtype: DType::U8,
                    place: Place::Cuda { ordinal: world.devices[at].ordinal() },
                };
                let (inputs, outputs) =
                    if kind.op().is_none() { (COUNTS[at], ROOM) } else { (ROOM, COUNTS[at]) };
                let sides = [raw(source, inputs), raw(target, outputs)];
                // SAFETY: both buffers are long enough, and live as long as the test.
                let call = unsafe { Call::from_raw(kind, &sides, &[counts]) };
                world.ranks[at].on(&world.streams[at]).submit(call).unwrap();
            }
            for (at, rank) in ranks.iter().enumerate() {
                let target = buffers[at][1].address();
                if kind.op().is_none() {
                    for (peer, (count, start)) in COUNTS.into_iter().zip(STARTS).enumerate() {
                        rank.compare(&world, at, (target + start as u64, count), &rank.parts[&of(peer)], 0);
                    }
                } else {
                    let sum = &rank.sums[&(DType::U8, ReduceOp::Sum.code())];
                    rank.compare(&world, at, (target, COUNTS[at]), sum, STARTS[at]);
                }
            }
            for (at, rank) in ranks.iter().enumerate() {
                world.raw_streams[at].synchronize().unwrap();
                world.ranks[at].check().unwrap();
                let mut wrong = [0; 8];
                rank.wrong.read(0, &mut wrong).unwrap();
                assert_eq!(u64::from_le_bytes(wrong), 0, "{kind:?}, {form}, rank {at}");
            }
        }
        world.end();
    }
}
