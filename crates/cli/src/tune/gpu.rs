//! Times forms of collectives on all GPUs of a world that this thread drives, in CUDA graphs, and compares every result.
//!
//! A choice is timed by graphs that hold many equal calls: each runs twice, and the second time counts, between two events. Turns go
//! round the choices of a size, so that a change of the machine's mood hits all alike; what counts is the lower quartile of the
//! slowest rank's times. Before that each graph runs once on poisoned outputs. Inputs are whole numbers whose sums are exact in
//! whatever order they are added, so all choices must give the same bits.

use std::error::Error;
use std::time::Duration;

use unisono::cuda::{Device, Event, Graph, Stream as CudaStream};
use unisono::gpu::Link;
use unisono::half::bf16;
use unisono::tuning::device::Table;
use unisono::tuning::device::select::{Rules, Wish};
use unisono::{
    Call, Communicator, DType, Form, Kind, Memory, Order, Place, RawBuffer, ReduceOp, Stream, Window, group,
};

use super::forms::{self, ELEMENT, Times};
use crate::bench::Operation;
use crate::bench::pattern::Patterns;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Sizes that are measured for a table: powers of two between these.
const SIZES: std::ops::RangeInclusive<u32> = 12..=27;
/// The most that a side of one rank takes there.
const MOST_BYTES: usize = 256 << 20;
/// A graph moves about so much, in at most so many calls.
const GRAPH_BYTES: usize = 64 << 20;
const MOST_CALLS: usize = 50;
const ROUNDS: usize = 7;
/// Outputs are read in pieces of this size.
const PIECE_BYTES: usize = 16 << 20;
const POISON: u8 = 0xa5;
const PATIENCE: Duration = Duration::from_secs(10);

/// The sizes that are measured for a table, in bytes of a part.
pub(super) fn sizes() -> impl Iterator<Item = usize> {
    SIZES.map(|shift| 1 << shift)
}

/// A world of ranks, one for each of the first GPUs.
pub(super) struct World {
    ranks: Vec<Communicator>,
    sides: Vec<Side>,
    patterns: Patterns,
    reduced: Vec<u8>,
}

/// What a rank works with.
struct Side {
    device: Device,
    queue: CudaStream,
    /// The same, for calls.
    stream: Stream,
    events: [Event; 2],
    source: Window<bf16>,
    target: Window<bf16>,
}

/// What is called.
#[derive(Clone, Copy)]
struct Job {
    operation: Operation,
    kind: Kind,
    bytes: usize,
    is_direct: bool,
}

impl World {
    /// Meets, and makes room for the largest of what is to be measured.
    pub(super) fn new(ranks: usize, room_bytes: usize) -> Result<Self> {
        let devices: Vec<u32> = (0..ranks as u32).collect();
        // Neither an older tuning file nor the order of sums may choose here.
        let builder = Communicator::builder().tune_file(None).timeout(Some(PATIENCE)).order(Order::Fixed);
        let ranks = builder.local(&devices)?;
        let rules = ranks[0].gpu_rules().ok_or("the ranks have no GPU")?;
        if rules.link != Link::Device {
            return Err("the GPUs do not reach each other's memory, and tables are for those that do".into());
        }
        if rules.is_narrow() {
            return Err("UNISONO_MULTIPROCESSORS leaves too few blocks to measure with: unset it".into());
        }
        let (host, count) = (Stream::host(), room_bytes / ELEMENT);
        let promised = group(|group| {
            let windows = |rank| {
                let on = group.on(rank, &host);
                Ok((on.window::<bf16>(count, Memory::Device)?, on.window::<bf16>(count, Memory::Device)?))
            };
            ranks.iter().map(windows).collect::<unisono::Result<Vec<_>>>()
        })?;
        let patterns = Patterns::exact(ranks.len(), 29);
        let reduced = patterns.reduced(DType::BF16, ReduceOp::Sum)?;
        let mut sides = Vec::new();
        for (ordinal, (source, target)) in devices.into_iter().zip(promised) {
            let device = Device::new(ordinal)?;
            let queue = CudaStream::new(&device)?;
            sides.push(Side {
                // SAFETY: the queue lies beside it and lives as long.
                stream: unsafe { Stream::cuda(queue.raw(), ordinal) }?,
                events: [Event::new(&device, true)?, Event::new(&device, true)?],
                source: source.take()?,
                target: target.take()?,
                device,
                queue,
            });
        }
        let world = Self { ranks, sides, patterns, reduced };
        world.fill_inputs()?;
        Ok(world)
    }

    /// Inputs of all ranks. Those of smaller sizes are their beginnings.
    fn fill_inputs(&self) -> Result<()> {
        for (rank, side) in self.sides.iter().enumerate() {
            let bytes = side.source.len() * ELEMENT;
            // Pieces are whole periods, so that each begins as the first.
            let period = self.patterns.input(rank).len();
            let mut piece = vec![0; (PIECE_BYTES / period * period).min(bytes)];
            self.patterns.fill(rank, &mut piece);
            for at in (0..bytes).step_by(piece.len().max(1)) {
                let piece = &piece[..piece.len().min(bytes - at)];
                // SAFETY: the window is as long, and no call works on it yet.
                unsafe { side.queue.write(side.source.address() + at as u64, piece) }?;
            }
            side.queue.synchronize()?;
        }
        Ok(())
    }

    /// The rules of the communicator with the built-in table, and no form that the environment asks for.
    pub(super) fn rules(&self) -> Result<Rules> {
        let rules = self.ranks[0].gpu_rules().ok_or("the ranks have no GPU")?;
        Ok(Rules { forced: None, table: Table::built_in(self.ranks.len()), ..rules })
    }

    /// Microseconds per call by each of these rules.
    pub(super) fn time(&mut self, operation: Operation, bytes: usize, choices: &[Rules]) -> Result<Vec<f64>> {
        let kind = operation.kind(ReduceOp::Sum).ok_or("the operation has no forms")?;
        let calls = (GRAPH_BYTES / bytes.max(1)).clamp(2, MOST_CALLS);
        let mut graphs = Vec::new();
        for rules in choices {
            let is_direct = rules.forced.is_some_and(|wish| wish.form == Form::Direct);
            let job = Job { operation, kind, bytes, is_direct };
            self.ranks.iter_mut().try_for_each(|rank| rank.change_gpu_rules(rules))?;
            let captured = self.capture(&job, calls)?;
            self.verify(&job, &captured).map_err(|error| {
                let form = rules.forced.map_or("any form", |wish| wish.form.name());
                format!("{} of {bytes} bytes by {form}: {error}", operation.name())
            })?;
            graphs.push(captured);
        }
        let mut times = vec![Vec::new(); graphs.len()];
        for _ in 0..ROUNDS {
            for (graphs, times) in graphs.iter().zip(&mut times) {
                times.push(self.round(graphs)? / calls as f64);
            }
        }
        let quartile = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 4]
        };
        Ok(times.into_iter().map(quartile).collect())
    }

    /// A graph of each rank with so many calls.
    fn capture(&mut self, job: &Job, calls: usize) -> Result<Vec<Graph>> {
        let parts = job.operation.parts(self.ranks.len());
        let mut graphs = Vec::new();
        for (rank, side) in self.ranks.iter().zip(&self.sides) {
            let is_root = job.kind.root().is_none_or(|root| root as usize == rank.rank());
            let (gives, gets) = match job.operation {
                Operation::Scatter => (is_root, true),
                Operation::Reduce | Operation::Gather => (true, is_root),
                _ => (true, true),
            };
            let raw = |window: &Window<bf16>, has: bool, parts: usize| RawBuffer {
                ptr: window.address(),
                count: if has { job.bytes / ELEMENT * parts } else { 0 },
                dtype: DType::BF16,
                place: match job.is_direct {
                    true => Place::Window { id: window.id() },
                    false => Place::Cuda { ordinal: side.device.ordinal() },
                },
            };
            let both = [raw(&side.source, gives, parts.0), raw(&side.target, gets, parts.1)];
            side.queue.begin_capture()?;
            let mut captured = Ok(());
            for _ in 0..calls {
                // SAFETY: the windows are as long as the call needs, and live until the streams were waited for.
                let call = unsafe { Call::from_raw(job.kind, &both, &[]) };
                captured = captured.and_then(|()| unisono::Operations::submit(&rank.on(&side.stream), call));
            }
            // The stream is given back to its work, whatever the calls answered.
            let graph = side.queue.end_capture();
            captured?;
            graphs.push(graph?);
        }
        Ok(graphs)
    }

    /// Runs the graphs once, and compares the outputs of all ranks.
    fn verify(&self, job: &Job, graphs: &[Graph]) -> Result<()> {
        let (_, parts) = job.operation.parts(self.ranks.len());
        for side in &self.sides {
            // SAFETY: the window is as long, and no call works on it.
            unsafe { side.queue.fill(side.target.address(), POISON, job.bytes * parts) }?;
        }
        // Nobody writes to a rank before its output is poisoned.
        self.settle()?;
        for (graph, side) in graphs.iter().zip(&self.sides) {
            graph.launch(&side.queue)?;
        }
        self.settle()?;
        let wrong = std::thread::scope(|scope| {
            let has_output =
                |rank: usize| rank == 0 || !matches!(job.operation, Operation::Reduce | Operation::Gather);
            let sides = self.sides.iter().enumerate().filter(|(rank, _)| has_output(*rank));
            let start = |(rank, side): (usize, &Side)| {
                let output =
                    Output { rank, parts, ordinal: side.device.ordinal(), address: side.target.address() };
                let (job, patterns, reduced) = (*job, &self.patterns, &self.reduced[..]);
                let wrong = move || output.wrong(&job, patterns, reduced).map_err(|error| error.to_string());
                (rank, scope.spawn(wrong))
            };
            let threads: Vec<_> = sides.map(start).collect();
            let join = |(rank, thread): (usize, std::thread::ScopedJoinHandle<'_, _>)| {
                (rank, thread.join().unwrap_or_else(|_| Err("it could not be compared".to_owned())))
            };
            threads.into_iter().map(join).collect::<Vec<_>>()
        });
        for (rank, wrong) in wrong {
            match wrong? {
                0 => {}
                wrong => return Err(format!("{wrong} elements of rank {rank} are wrong").into()),
            }
        }
        Ok(())
    }

    /// Microseconds of the slowest rank's graph. Each runs twice, so that all ranks are under way when the second begins.
    fn round(&self, graphs: &[Graph]) -> Result<f64> {
        for (graph, side) in graphs.iter().zip(&self.sides) {
            let [start, end] = &side.events;
            graph.launch(&side.queue)?;
            start.record(&side.queue)?;
            graph.launch(&side.queue)?;
            end.record(&side.queue)?;
        }
        self.settle()?;
        let mut slowest = 0.0f64;
        for Side { events: [start, end], .. } in &self.sides {
            slowest = slowest.max(end.us_since(start)?);
        }
        Ok(slowest)
    }

    /// Waits for all ranks, and asks how it went.
    fn settle(&self) -> Result<()> {
        self.sides.iter().try_for_each(|side| side.queue.synchronize())?;
        Ok(self.ranks.iter().try_for_each(Communicator::check)?)
    }

    /// Ends the world, so that the next one finds the devices empty.
    pub(super) fn end(self) -> Result<()> {
        let host = Stream::host();
        group(|group| {
            for (rank, side) in self.ranks.iter().zip(self.sides) {
                let on = group.on(rank, &host);
                on.close(side.source)?;
                on.close(side.target)?;
            }
            Ok(())
        })?;
        Ok(group(|group| {
            self.ranks.into_iter().for_each(|rank| group.destroy(rank));
            Ok(())
        })?)
    }
}

/// Where a rank has what it got.
struct Output {
    rank: usize,
    parts: usize,
    ordinal: u32,
    address: u64,
}

impl Output {
    /// Elements of it that are wrong.
    fn wrong(&self, job: &Job, patterns: &Patterns, reduced: &[u8]) -> Result<u64> {
        let queue = CudaStream::new(&Device::new(self.ordinal)?)?;
        let mut got = vec![0; PIECE_BYTES.min(job.bytes)];
        let (count, mut wrong) = (job.bytes / ELEMENT, 0);
        for part in 0..self.parts {
            let (expected, begin) = patterns.expected(job.operation, reduced, (self.rank, part, count));
            for at in (0..job.bytes).step_by(PIECE_BYTES) {
                let piece = &mut got[..PIECE_BYTES.min(job.bytes - at)];
                let address = self.address + (part * job.bytes + at) as u64;
                // SAFETY: the window is as long, and no call works on it.
                unsafe { queue.read(address, piece) }?;
                wrong += patterns.wrong_from(expected, begin + at / ELEMENT, piece);
            }
        }
        Ok(wrong)
    }
}

/// The name of the first `count` GPUs, which are of one kind and reach each other.
pub(super) fn name_of(count: usize) -> Result<String> {
    let devices = (0..count).map(|ordinal| Ok(Device::new(ordinal as u32)?)).collect::<Result<Vec<_>>>()?;
    let name = &devices[0].facts().name;
    for device in &devices {
        let other = &device.facts().name;
        if other != name {
            let mend = "CUDA_VISIBLE_DEVICES names some";
            return Err(
                format!("a table is for GPUs of one kind, and these are {name} and {other}: {mend}").into()
            );
        }
        for peer in &devices {
            if device != peer && !device.reaches(peer)? {
                return Err(format!(
                    "cuda:{} does not reach the memory of cuda:{}, and tables are for GPUs that do",
                    device.ordinal(),
                    peer.ordinal()
                )
                .into());
            }
        }
    }
    Ok(name.clone())
}

/// Measures all of an operation that its row of the table depends on; `done` is called after each size.
pub(super) fn measure(world: &mut World, operation: Operation, done: &dyn Fn()) -> Result<Times> {
    let rules = world.rules()?;
    let kind = operation.kind(ReduceOp::Sum).ok_or("the operation has no forms")?;
    let mut times = Times::new(rules, kind);
    for bytes in table_sizes(operation, world.ranks.len()) {
        let choices = forms::candidates(&rules, kind, bytes);
        for (choice, us) in choices.iter().zip(world.time(operation, bytes, &choices)?) {
            times.add(bytes, choice, us);
        }
        done();
    }
    Ok(times)
}

/// The sizes of an operation among so many ranks.
pub(super) fn table_sizes(operation: Operation, ranks: usize) -> impl Iterator<Item = usize> {
    let (parts_in, parts_out) = operation.parts(ranks);
    sizes().filter(move |bytes| bytes * parts_in.max(parts_out) <= MOST_BYTES)
}

/// The room that [`measure`] needs.
pub(super) const fn table_room() -> usize {
    MOST_BYTES
}

/// Times these forms as they are, and prints a line for each size and form: bytes, form, grid, vectors of a tile, microseconds and
/// GB/s of the bus.
pub(super) fn sweep(
    ranks: usize,
    operations: &[Operation],
    sizes: &[usize],
    wishes: &[Wish],
    print: &dyn Fn(&str),
) -> Result<()> {
    let most_parts = operations.iter().map(|operation| {
        let (parts_in, parts_out) = operation.parts(ranks);
        parts_in.max(parts_out)
    });
    let room = sizes.iter().max().unwrap_or(&0) * most_parts.max().unwrap_or(1);
    let mut world = World::new(ranks, room.next_multiple_of(ELEMENT))?;
    let rules = world.rules()?;
    for operation in operations {
        let kind = operation.kind(ReduceOp::Sum).ok_or("the operation has no forms")?;
        print(&format!("{} {ranks} ranks: bytes form:blocks tile us busbw", operation.name()));
        for bytes in sizes {
            let choices: Vec<Rules> = wishes
                .iter()
                .map(|wish| Rules { forced: Some(*wish), ..rules })
                .filter(|rules| {
                    rules.forced.is_some_and(|wish| wish.form == launch(rules, kind, *bytes).form)
                })
                .collect();
            for (rules, us) in choices.iter().zip(world.time(*operation, *bytes, &choices)?) {
                let (launch, (_, busbw)) =
                    (launch(rules, kind, *bytes), operation.bandwidth(ranks, *bytes, us));
                let wish = rules.forced.map_or_else(String::new, |wish| wish.to_string());
                print(&format!(
                    "{bytes:>11} {wish} {}x{} {} {us:.2} {busbw:.1}",
                    launch.blocks, launch.threads, launch.tile
                ));
            }
        }
    }
    world.end()
}

fn launch(rules: &Rules, kind: Kind, bytes: usize) -> unisono::tuning::device::Launch {
    rules.decide(&unisono::tuning::device::select::Question {
        kind,
        bytes,
        size: ELEMENT,
        is_reachable: true,
    })
}
