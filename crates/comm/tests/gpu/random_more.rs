//! What random operations draw beside collectives of one kind of part: messages in groups, parts that only two ranks know of, counts in
//! memory of the device, rows that are normalised, quantised sums. Inputs of the last three and what must come of them are made
//! once, for some cases; all of it is compared on the devices.

use unisono::cuda::DeviceBuffer;
use unisono::half::bf16;
use unisono::{
    AllToAllCounted, Buf, BufMut, Builder, Call, DType, Kind, Operations, Place, RawBuffer, group,
};
use unisono_core::fused::NormOutput;

use crate::numbers::Random;
use crate::quantised_sums::Sum;
use crate::random::{PERIOD, Rank, size};
use crate::rows::{Given, Rows, SCALE};
use crate::world::World;

/// Bytes in which inputs of messages repeat: those of bf16, which have the room.
const BYTES: usize = PERIOD * 2;
/// The most bytes of a message.
const MOST: usize = 4 << 20;
/// Where second and third outputs lie in the memory of a rank.
const PLACES: [u64; 3] = [0, 32 << 20, 64 << 20];
/// Cases of each kind that are made once.
const CASES: usize = 8;

pub(crate) fn prepared(builder: Builder) -> Builder {
    builder.prepare_rms_norm::<bf16>().prepare_quantised::<bf16>().prepare_quantised::<f32>()
}

#[derive(Clone, Copy, Debug)]
struct Message {
    from: usize,
    to: usize,
    tag: u32,
    bytes: usize,
}

#[derive(Clone, Debug)]
enum What {
    /// In one group on each rank.
    Messages(Vec<Message>),
    /// Bytes from each rank to each.
    AllToAllV(Vec<Vec<usize>>),
    /// The root, and the bytes of each rank.
    GatherV(usize, Vec<usize>),
    ScatterV(usize, Vec<usize>),
    /// To the rank so far behind each, by one call; and its bytes.
    Shift(usize, usize),
    Barrier,
    /// The number of a case.
    Counted(usize),
    Rows(usize),
    Quantised(usize),
}

/// One operation, the same on all ranks.
#[derive(Clone, Debug)]
pub(crate) struct More {
    what: What,
    /// Bytes of the period that inputs begin with, and by which outputs miss a line.
    phase: usize,
    shift: usize,
    is_in_place: bool,
    is_replayed: bool,
}

/// Of each rank, what cases take and give.
pub(crate) struct Cases {
    rows: Vec<Rows>,
    row_sides: Vec<Vec<RowSides>>,
    sums: Vec<Sum>,
    sum_sides: Vec<Vec<[DeviceBuffer; 2]>>,
    /// Bytes from each rank to each, and room for those from one.
    tables: Vec<(Vec<Vec<usize>>, usize)>,
    /// The counts that each rank gives, and those that it is told.
    lists: Vec<Vec<[DeviceBuffer; 2]>>,
}

struct RowSides {
    input: DeviceBuffer,
    residual: DeviceBuffer,
    weight: DeviceBuffer,
    scale: DeviceBuffer,
    /// New residual, output and scales, as they must be.
    expected: [DeviceBuffer; 3],
}

impl Cases {
    pub(crate) fn new(world: &World, random: &mut Random) -> Self {
        let ranks = world.ranks.len();
        let upload = |rank: usize, bytes: &[u8]| {
            let mut buffer = DeviceBuffer::new(&world.devices[rank], bytes.len().max(1)).unwrap();
            buffer.write(0, bytes).unwrap();
            buffer
        };
        let outputs = [NormOutput::Same, NormOutput::Fp8, NormOutput::Fp8PerToken];
        let rows: Vec<Rows> = (0..CASES)
            .map(|at| {
                // The last goes in two kernels.
                let tokens = if at + 1 == CASES { 310 } else { 1 + random.below(40) };
                let hidden = if at + 1 == CASES { 4096 } else { 8 * (1 + random.below(1024)) };
                let output = outputs[at % 3];
                let is_in_place = random.below(2) == 0 && at + 1 != CASES;
                let seed = random.next();
                Rows { dtype: DType::BF16, tokens, hidden, epsilon: 1e-5, output, is_in_place, seed }
            })
            .collect();
        let row_sides = rows.iter().map(|rows| {
            let given: Vec<Given> = (0..ranks).map(|rank| rows.given(rank)).collect();
            let sum = rows.sum(&given);
            let sides = given.iter().enumerate().map(|(rank, given)| {
                let expected = rows.expected(&sum, &given.residual, &given.weight);
                let scales: Vec<u8> = expected.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                let expected = [&expected.residual, &expected.output, &scales];
                RowSides {
                    input: upload(rank, &given.input),
                    residual: upload(rank, &given.residual),
                    weight: upload(rank, &given.weight),
                    scale: upload(rank, &SCALE.to_le_bytes()),
                    expected: expected.map(|bytes| upload(rank, bytes)),
                }
            });
            sides.collect()
        });
        let row_sides = row_sides.collect();
        let sum = |at: usize, random: &mut Random| Sum {
            dtype: if at.is_multiple_of(2) { DType::BF16 } else { DType::F32 },
            count: random.count(300_000),
            seed: random.next(),
        };
        let sums: Vec<Sum> = (0..CASES).map(|at| sum(at, random)).collect();
        let sum_sides = sums.iter().map(|sum| {
            let inputs: Vec<Vec<u8>> = (0..ranks).map(|rank| sum.input(rank)).collect();
            let expected = sum.expected(&inputs);
            let sides = inputs.iter().enumerate();
            sides.map(|(rank, input)| [upload(rank, input), upload(rank, &expected)]).collect()
        });
        let sum_sides = sum_sides.collect();
        let table = |at: usize, random: &mut Random| {
            let room = [0, 100, 5000, 200_000, 1 << 20, (1 << 20) + 500_000, 33, 40_000][at];
            let mut count = || if random.below(4) == 0 { 0 } else { random.below(room + 1) };
            let table = (0..ranks).map(|_| (0..ranks).map(|_| count()).collect()).collect();
            (table, room)
        };
        let tables: Vec<(Vec<Vec<usize>>, usize)> = (0..CASES).map(|at| table(at, random)).collect();
        let lists = tables.iter().map(|(table, _)| {
            let list = |rank: usize, counts: Vec<usize>| {
                let bytes: Vec<u8> = counts.iter().flat_map(|count| (*count as u32).to_le_bytes()).collect();
                upload(rank, &bytes)
            };
            let told = |rank: usize| table.iter().map(|row| row[rank]).collect();
            (0..ranks).map(|rank| [list(rank, table[rank].clone()), list(rank, told(rank))]).collect()
        });
        let lists = lists.collect();
        Self { rows, row_sides, sums, sum_sides, tables, lists }
    }
}

impl More {
    pub(crate) fn random(random: &mut Random, ranks: usize) -> Self {
        let message = |random: &mut Random| {
            let (from, by) = (random.below(ranks), 1 + random.below(ranks - 1));
            let bytes = size(random, MOST);
            Message { from, to: (from + by) % ranks, tag: random.below(3), bytes }
        };
        let is_in_place = random.below(3) == 0;
        let what = match random.below(12) {
            0..3 => What::Messages((0..1 + random.below(7)).map(|_| message(random)).collect()),
            3 => {
                let most = size(random, 2 << 20).max(1);
                let sizes: Vec<usize> = (0..ranks * ranks).map(|_| random.below(most + 1)).collect();
                // In place, as much comes from a rank as goes to it.
                let pair = |a: usize, b: usize| if is_in_place { (a.min(b), a.max(b)) } else { (a, b) };
                let bytes = |from, to| {
                    let (row, column) = pair(from, to);
                    sizes[row * ranks + column]
                };
                let table = (0..ranks).map(|from| (0..ranks).map(|to| bytes(from, to)).collect()).collect();
                What::AllToAllV(table)
            }
            4 => What::Counted(random.below(CASES)),
            5 | 6 => What::Rows(random.below(CASES)),
            7 => What::Quantised(random.below(CASES)),
            parts @ (8 | 9) => {
                let most = size(random, 2 << 20);
                let root = random.below(ranks);
                let bytes = (0..ranks).map(|_| random.below(most + 1)).collect();
                if parts == 8 { What::GatherV(root, bytes) } else { What::ScatterV(root, bytes) }
            }
            10 => What::Shift(1 + random.below(ranks - 1), size(random, MOST)),
            _ => What::Barrier,
        };
        let (phase, shift) = (random.below(BYTES), random.below(16));
        Self { what, phase, shift, is_in_place, is_replayed: random.below(8) == 0 }
    }

    /// Where output `place` lies on `rank`; those of rows and sums begin with a whole element.
    fn target(&self, rank: &Rank, place: usize) -> u64 {
        let step = match self.what {
            What::Rows(_) | What::Quantised(_) => 4,
            _ => 1,
        };
        rank.target.address() + PLACES[place] + (self.shift * step) as u64
    }

    /// Enqueues it on rank `at`, and what compares its results.
    pub(crate) fn run(&self, world: &World, at: usize, rank: &Rank, cases: &Cases) {
        let stream = &world.raw_streams[at];
        for (place, bytes) in PLACES.iter().zip(self.written(cases, at)) {
            // SAFETY: the memory of the rank has all of it, and lives as long as the test. What is not written differs.
            unsafe { stream.fill(rank.target.address() + place, 0xa5, bytes + 64) }.unwrap();
        }
        if self.is_replayed {
            stream.begin_capture().unwrap();
            self.enqueue(world, at, rank, cases);
            let graph = stream.end_capture().unwrap();
            graph.launch(stream).unwrap();
            graph.launch(stream).unwrap();
        } else {
            self.enqueue(world, at, rank, cases);
        }
        self.compare(world, at, rank, cases);
    }

    /// Bytes of each output of rank `at`.
    fn written(&self, cases: &Cases, at: usize) -> [usize; 3] {
        match &self.what {
            What::Messages(messages) => {
                let mine = messages.iter().filter(|message| message.to == at);
                [mine.map(|message| message.bytes).sum(), 0, 0]
            }
            What::AllToAllV(table) => [table.iter().map(|row| row[at]).sum(), 0, 0],
            What::GatherV(root, bytes) if *root == at => [bytes.iter().sum(), 0, 0],
            What::ScatterV(_, bytes) => [bytes[at], 0, 0],
            What::Shift(_, bytes) => [*bytes, 0, 0],
            What::GatherV(..) | What::Barrier => [0; 3],
            What::Counted(case) => {
                let (table, room) = &cases.tables[*case];
                [room * table.len(), 4 * table.len(), 0]
            }
            What::Rows(case) => {
                let rows = &cases.rows[*case];
                [rows.count() * 2, rows.count() * rows.output_size(), rows.tokens * 4]
            }
            What::Quantised(case) => [cases.sums[*case].bytes(), 0, 0],
        }
    }

    fn enqueue(&self, world: &World, at: usize, rank: &Rank, cases: &Cases) {
        let (on, stream) = (world.ranks[at].on(&world.streams[at]), &world.raw_streams[at]);
        let ordinal = world.devices[at].ordinal();
        let source = rank.inputs[&DType::BF16].address() + self.phase as u64;
        let place = |place: usize| self.target(rank, place);
        // SAFETY: all memory is as long as that, and lives as long as the test; one call at a time has it.
        let input = |at: u64, bytes: usize| unsafe { Buf::<u8>::cuda(at, bytes, ordinal) };
        // SAFETY: as above.
        let output = |at: u64, bytes: usize| unsafe { BufMut::<u8>::cuda(at, bytes, ordinal) };
        let raw = |ptr: u64, count: usize, dtype: DType| RawBuffer {
            ptr,
            count,
            dtype,
            place: Place::Cuda { ordinal },
        };
        match &self.what {
            What::Messages(messages) => {
                let mut to = place(0);
                group(|group| {
                    let on = group.on(&world.ranks[at], &world.streams[at]);
                    for message in messages {
                        if message.from == at {
                            on.send(input(source, message.bytes), message.to, message.tag)?;
                        }
                        if message.to == at {
                            on.recv(output(to, message.bytes), message.from, message.tag)?;
                            to += message.bytes as u64;
                        }
                    }
                    Ok(())
                })
                .unwrap();
            }
            What::AllToAllV(table) => {
                let into: Vec<usize> = table.iter().map(|row| row[at]).collect();
                let (sent, received) = (table[at].iter().sum(), into.iter().sum());
                if self.is_in_place {
                    // SAFETY: as above.
                    unsafe { stream.copy(place(0), source, sent) }.unwrap();
                }
                let from = if self.is_in_place { place(0) } else { source };
                let (input, output) = (input(from, sent), output(place(0), received));
                on.all_to_all_v(input, &table[at], output, &into).unwrap();
            }
            What::GatherV(root, bytes) => {
                let room = if *root == at { bytes.iter().sum() } else { 0 };
                on.gather_v(input(source, bytes[at]), output(place(0), room), bytes, *root).unwrap();
            }
            What::ScatterV(root, bytes) => {
                let given = if *root == at { bytes.iter().sum() } else { 0 };
                on.scatter_v(input(source, given), output(place(0), bytes[at]), bytes, *root).unwrap();
            }
            What::Shift(by, bytes) => {
                let ranks = world.ranks.len();
                let (to, from) = ((at + by) % ranks, (at + ranks - by) % ranks);
                on.send_recv(input(source, *bytes), to, output(place(0), *bytes), from, 0).unwrap();
            }
            What::Barrier => on.barrier().unwrap(),
            What::Counted(case) => {
                let (table, room) = &cases.tables[*case];
                let list = |at: u64| (at, table.len(), ordinal);
                let (counts, told) = (list(cases.lists[*case][at][0].address()), list(self.told(rank)));
                // SAFETY: as above.
                let (send_counts, recv_counts) = unsafe {
                    (
                        Buf::<u32>::cuda(counts.0, counts.1, counts.2),
                        BufMut::<u32>::cuda(told.0, told.1, told.2),
                    )
                };
                on.all_to_all_counted(AllToAllCounted {
                    input: input(source, table[at].iter().sum()),
                    send_counts,
                    send_offsets: None,
                    output: output(place(0), room * table.len()),
                    recv_counts,
                })
                .unwrap();
            }
            What::Rows(case) => {
                let (rows, sides) = (&cases.rows[*case], &cases.row_sides[*case][at]);
                let (count, dtype) = (rows.count(), rows.dtype);
                let mut residual = sides.residual.address();
                if rows.is_in_place {
                    // SAFETY: as above.
                    unsafe { stream.copy(place(0), residual, count * 2) }.unwrap();
                    residual = place(0);
                }
                let mut buffers = vec![
                    raw(sides.input.address(), count, dtype),
                    raw(residual, count, dtype),
                    raw(place(0), count, dtype),
                    raw(sides.weight.address(), rows.hidden, dtype),
                    raw(place(1), count, rows.output.dtype(dtype)),
                ];
                match rows.output {
                    NormOutput::Same => {}
                    NormOutput::Fp8 => buffers.push(raw(sides.scale.address(), 1, DType::F32)),
                    NormOutput::Fp8PerToken => buffers.push(raw(place(2), rows.tokens, DType::F32)),
                }
                // SAFETY: as above.
                on.submit(unsafe { Call::from_raw(rows.kind(), &buffers, &[]) }).unwrap();
            }
            What::Quantised(case) => {
                let (sum, [given, _]) = (&cases.sums[*case], &cases.sum_sides[*case][at]);
                if self.is_in_place {
                    // SAFETY: as above.
                    unsafe { stream.copy(place(0), given.address(), sum.bytes()) }.unwrap();
                }
                let both = [given.address(), place(0)].map(|at| raw(at, sum.count, sum.dtype));
                let used = if self.is_in_place { &both[1..] } else { &both[..] };
                // SAFETY: as above.
                on.submit(unsafe { Call::from_raw(Kind::AllReduceQuantised, used, &[]) }).unwrap();
            }
        }
    }

    /// Where counts are told: on whole words.
    fn told(&self, rank: &Rank) -> u64 {
        rank.target.address() + PLACES[1]
    }

    fn compare(&self, world: &World, at: usize, rank: &Rank, cases: &Cases) {
        let place = |place: usize| self.target(rank, place);
        // Bytes of rank `from`, of which the first `behind` go elsewhere.
        let part = |to: u64, from: usize, behind: usize, bytes: usize| {
            let expected = &rank.parts[&(DType::BF16, from)];
            rank.compare(world, at, (to, bytes), expected, self.phase + behind);
        };
        let whole = |to: u64, bytes: usize, expected: &DeviceBuffer| {
            rank.compare(world, at, (to, bytes), expected, 0);
        };
        match &self.what {
            What::Messages(messages) => {
                let mut to = place(0);
                for message in messages.iter().filter(|message| message.to == at) {
                    part(to, message.from, 0, message.bytes);
                    to += message.bytes as u64;
                }
            }
            What::AllToAllV(table) => {
                let mut to = place(0);
                for (from, row) in table.iter().enumerate() {
                    part(to, from, row[..at].iter().sum(), row[at]);
                    to += row[at] as u64;
                }
            }
            What::GatherV(root, bytes) => {
                let mut to = place(0);
                for (from, bytes) in bytes.iter().enumerate().filter(|_| *root == at) {
                    part(to, from, 0, *bytes);
                    to += *bytes as u64;
                }
            }
            What::ScatterV(root, bytes) => part(place(0), *root, bytes[..at].iter().sum(), bytes[at]),
            What::Shift(by, bytes) => {
                let ranks = world.ranks.len();
                part(place(0), (at + ranks - by) % ranks, 0, *bytes);
            }
            What::Barrier => {}
            What::Counted(case) => {
                let (table, room) = &cases.tables[*case];
                for (from, row) in table.iter().enumerate() {
                    part(place(0) + (from * room) as u64, from, row[..at].iter().sum(), row[at]);
                }
                whole(self.told(rank), 4 * table.len(), &cases.lists[*case][at][1]);
            }
            What::Rows(case) => {
                let (rows, sides) = (&cases.rows[*case], &cases.row_sides[*case][at]);
                let bytes = self.written(cases, at);
                let outputs = if rows.output == NormOutput::Fp8PerToken { 3 } else { 2 };
                for (number, expected) in sides.expected.iter().enumerate().take(outputs) {
                    whole(place(number), bytes[number], expected);
                }
            }
            What::Quantised(case) => {
                whole(place(0), cases.sums[*case].bytes(), &cases.sum_sides[*case][at][1]);
            }
        }
    }
}
