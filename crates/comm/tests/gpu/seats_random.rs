//! Random sequences on ranks with several devices: operations on a buffer of each device between operations of the first devices, messages and
//! barriers; one by one, in groups, and captured. Every byte of every device is compared, bit for bit, with the scalar reference.
//!
//! `UNISONO_TEST_SEED` repeats a run, `UNISONO_TEST_SCALE=50` makes it fifty times as long.

use unisono::cuda::{Event, Stream as CudaStream};
use unisono::{Buf, BufMut, Call, Communicator, Kind, Operations, RawBuffer, Result, group};
use unisono_core::device::Form;

use crate::OPERATIONS;
use crate::case::{Case, Operation, expected, input};
use crate::numbers::{self, Random};
use crate::random::size;
use crate::seats::{MOST_BYTES, PAIRS, Tools, has_equal_ranks, layouts, on_ranks, prepared};

/// Operations of a batch, each with a place of its own on every device: outputs, and in the second half inputs.
const STEPS: usize = 8;
const PLACE: usize = MOST_BYTES / STEPS;
const HALF: usize = PLACE / 2;

/// Operations with one part, or parts of one size.
const OF_FIRST_DEVICES: &[Operation] = OPERATIONS.split_at(8).0;

/// One operation, the same on all ranks.
#[derive(Clone, Debug)]
enum Step {
    /// On a buffer of each device, the root being one of them.
    Multi(Case),
    /// On the first device of each rank.
    First(Case),
    /// So many bytes from one rank to another.
    Message {
        from: usize,
        to: usize,
        bytes: usize,
    },
    Barrier,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    Alone,
    Grouped,
    Captured,
}

impl Step {
    fn random(random: &mut Random, layout: &[Vec<u32>]) -> Self {
        let (ranks, seats) = (layout.len(), layout.iter().map(Vec::len).sum());
        let (dtype, op) = PAIRS[random.below(PAIRS.len())];
        let case = |random: &mut Random, operation, parts: usize, roots| {
            let count = size(random, HALF / dtype.size() / parts);
            let can_be = matches!(operation, Operation::AllReduce | Operation::Broadcast);
            let is_in_place = can_be && random.below(2) == 0;
            Case { operation, dtype, op, count, root: random.below(roots), is_in_place, offset: 0 }
        };
        match random.below(8) {
            0..4 => {
                let is_sum = has_equal_ranks(layout) && random.below(3) > 0;
                let operation = if is_sum { Operation::AllReduce } else { Operation::Broadcast };
                Self::Multi(Case { is_in_place: true, ..case(random, operation, 1, seats) })
            }
            4 | 5 => {
                let operation = random.pick(OF_FIRST_DEVICES);
                let has_one =
                    matches!(operation, Operation::AllReduce | Operation::Broadcast | Operation::Reduce);
                Self::First(case(random, operation, if has_one { 1 } else { ranks }, ranks))
            }
            6 if ranks > 1 => {
                let (from, by) = (random.below(ranks), 1 + random.below(ranks - 1));
                Self::Message { from, to: (from + by) % ranks, bytes: size(random, HALF) }
            }
            _ => Self::Barrier,
        }
    }
}

/// What a step does on one rank: how it is called, and what a device has in its place before and must have then.
struct Work<'t> {
    tools: &'t Tools,
    communicator: &'t Communicator,
    step: &'t Step,
    /// Where its place begins.
    at: usize,
}

impl Work<'_> {
    fn kind(&self, case: &Case) -> Kind {
        let Step::Multi(_) = self.step else { return case.kind(self.tools.rank) };
        match case.operation {
            Operation::AllReduce => Kind::AllReduceMulti { op: case.op },
            _ => {
                let (root, buffer) = self.tools.seat_at(case.root);
                Kind::BroadcastMulti { root: root as u32, buffer: buffer as u32 }
            }
        }
    }

    /// Memory of device `seat`, from so many bytes behind the beginning of the place.
    fn memory(&self, seat: usize, behind: usize, case: &Case) -> RawBuffer {
        let buffer = self.tools.buffer(seat, case.dtype, case.count);
        RawBuffer { ptr: buffer.ptr + (self.at + behind) as u64, ..buffer }
    }

    fn collective(&self, case: &Case) -> Call<'static> {
        let tools = self.tools;
        let buffers: Vec<RawBuffer> = match self.step {
            Step::Multi(_) => (0..tools.streams.len()).map(|seat| self.memory(seat, 0, case)).collect(),
            _ => {
                let shape = case.shape(tools.rank, tools.layout.len());
                shape.buffers(self.memory(0, HALF, case), self.memory(0, 0, case))
            }
        };
        // SAFETY: the memory stays until the streams were waited for, and each step has a place of its own.
        unsafe { Call::from_raw(self.kind(case), &buffers, &[]) }
    }

    /// Through `first`, which has the operations on the first device, or `each`.
    fn submit<'b>(
        &self,
        first: &impl Operations<'b, Done = ()>,
        each: &impl Operations<'b, Done = ()>,
    ) -> Result<()> {
        match self.step {
            Step::Multi(case) => each.submit(self.collective(case)),
            Step::First(case) => first.submit(self.collective(case)),
            Step::Barrier => first.barrier(),
            Step::Message { from, to, bytes } => {
                let RawBuffer { ptr, .. } = self.tools.buffer(0, PAIRS[0].0, 0);
                let (at, ordinal) = (ptr + self.at as u64, self.tools.layout[self.tools.rank][0]);
                // SAFETY: as above.
                let (source, target) = unsafe {
                    let source = Buf::<u8>::cuda(at + HALF as u64, *bytes, ordinal);
                    (source, BufMut::<u8>::cuda(at, *bytes, ordinal))
                };
                match self.tools.rank {
                    rank if rank == *from => first.send(source, *to, 0),
                    rank if rank == *to => first.recv(target, *from, 0),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Fills in what device `seat` has before, and what it must have then.
    fn fill(&self, seat: usize, before: &mut [u8], after: &mut [u8]) {
        let Tools { rank, layout, .. } = self.tools;
        let mut put = |behind: usize, data: &[u8], is_given: bool| {
            let place = self.at + behind..self.at + behind + data.len();
            after[place.clone()].copy_from_slice(data);
            if is_given {
                before[place].copy_from_slice(data);
            }
        };
        match self.step {
            Step::Barrier => {}
            Step::Message { from, to, bytes } => {
                let case = Case { dtype: unisono::DType::U8, count: *bytes, ..Case::default() };
                let data = input(&case, *from, layout.len());
                if seat == 0 && rank == from {
                    put(HALF, &data[..*bytes], true);
                }
                if seat == 0 && rank == to {
                    put(0, &data[..*bytes], false);
                }
            }
            Step::First(_) if seat > 0 => {}
            Step::Multi(case) | Step::First(case) => {
                let (me, all) = match self.step {
                    Step::Multi(_) => (self.tools.first_of(*rank) + seat, self.tools.all()),
                    _ => (*rank, layout.len()),
                };
                let inputs: Vec<Vec<u8>> = (0..all).map(|from| input(case, from, all)).collect();
                let (shape, size) = (case.shape(me, all), case.dtype.size());
                let behind = if shape.is_in_place { shape.input_at * size } else { HALF };
                put(behind, &inputs[me][..shape.inputs * size], true);
                let (kind, bytes) = (self.kind(case), case.most_bytes(all));
                let form = self.communicator.gpu_choice(kind, bytes, size).map(|launch| launch.form);
                for (start, piece) in expected(case, &inputs, form, me) {
                    put((shape.output_at + start) * size, &piece, false);
                }
            }
        }
    }
}

/// Captures what `enqueue` puts into the streams, which are forked from the first and joined there, and launches it once.
fn captured(streams: &[&CudaStream], enqueue: impl FnOnce()) {
    let events: Vec<Event> =
        streams.iter().map(|stream| Event::new(stream.device(), false).unwrap()).collect();
    streams[0].begin_capture().unwrap();
    events[0].record(streams[0]).unwrap();
    streams[1..].iter().for_each(|stream| stream.wait(&events[0]).unwrap());
    enqueue();
    for (stream, event) in streams.iter().zip(&events).skip(1) {
        event.record(stream).unwrap();
        streams[0].wait(event).unwrap();
    }
    let graph = streams[0].end_capture().unwrap();
    graph.launch(streams[0]).unwrap();
    streams[0].synchronize().unwrap();
}

fn run(communicator: &Communicator, tools: &mut Tools, seed: u64, batches: u64) {
    let mut random = Random::new(seed);
    // Branches of a graph need not run at once on one device.
    let have_devices = tools
        .layout
        .iter()
        .all(|ordinals| (0..ordinals.len()).all(|at| !ordinals[..at].contains(&ordinals[at])));
    for batch in 0..batches {
        let steps: Vec<Step> =
            (0..1 + random.below(STEPS)).map(|_| Step::random(&mut random, &tools.layout)).collect();
        let how = match random.below(3) {
            0 => How::Grouped,
            1 if have_devices => How::Captured,
            _ => How::Alone,
        };
        let what = format!("{how:?} batch {batch} of seed {seed} on {:?}: {steps:#?}", tools.layout);
        let images: Vec<[Vec<u8>; 2]> = {
            let tools = &*tools;
            let image = |seat: usize| {
                let [mut before, mut after] = [(); 2].map(|()| vec![0xc3; MOST_BYTES]);
                for (at, step) in steps.iter().enumerate() {
                    let work = Work { tools, communicator, step, at: at * PLACE };
                    work.fill(seat, &mut before, &mut after);
                }
                [before, after]
            };
            (0..tools.streams.len()).map(image).collect()
        };
        images.iter().enumerate().for_each(|(seat, [before, _])| tools.write(seat, before));
        communicator.barrier().unwrap();
        let works = || {
            let work = |(at, step)| Work { tools: &*tools, communicator, step, at: at * PLACE };
            steps.iter().enumerate().map(work)
        };
        let alone = || {
            let (first, each) = (communicator.on(&tools.streams[0]), communicator.on_each(&tools.streams));
            works().for_each(|work| {
                work.submit(&first, &each).unwrap_or_else(|error| panic!("{error}: {what}"))
            });
        };
        match how {
            How::Alone => alone(),
            How::Captured => captured(&tools.raw_streams(), alone),
            How::Grouped => {
                let grouped = group(|group| {
                    let first = group.on(communicator, &tools.streams[0]);
                    let each = group.on_each(communicator, &tools.streams);
                    works().try_for_each(|work| work.submit(&first, &each))
                });
                grouped.unwrap_or_else(|error| panic!("{error}: {what}"));
            }
        }
        tools.wait();
        communicator.check().unwrap_or_else(|error| panic!("{error}: {what}"));
        for (seat, [_, after]) in images.iter().enumerate() {
            tools.expect(seat, after, &what);
        }
        communicator.barrier().unwrap();
    }
}

#[test]
fn random_sequences_on_several_devices_have_the_bits_of_the_reference() {
    let seed = numbers::seed();
    let scale = std::env::var("UNISONO_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    println!("UNISONO_TEST_SEED={seed}");
    for layout in layouts() {
        for form in [None, Some(Form::TwoShotLines), Some(Form::Bulk), Some(Form::Ring)] {
            let configure = |builder| match form {
                Some(form) => prepared(builder).gpu_algorithm(form, 0),
                None => prepared(builder),
            };
            on_ranks(&layout, configure, |communicator, tools| {
                run(&communicator, tools, seed ^ form.map_or(0, |form| form as u64 + 1), 12 * scale);
                communicator.destroy().unwrap();
            });
        }
    }
}
