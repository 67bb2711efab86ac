//! One rank of a benchmark on GPUs: verifies every size of every operation, then times it eagerly and in a CUDA graph.
//!
//! A round begins behind a barrier of the hosts and times, between two events, a batch of submitted calls, and a graph that
//! captured as many; ours and NCCL's take turns, on the same buffers. What counts of each round is the slowest rank's time,
//! and of all rounds the median.

use std::io::Write as _;
use std::time::{Duration, Instant};

use unisono::cuda::{self, Device, DeviceBuffer, Event, Graph, Stream as CudaStream};
use unisono::half::{bf16, f16};
use unisono::launch::Launch;
use unisono::{Builder, Call, Communicator, DType, Form, Kind, Operations, Place, RawBuffer, Stream, gpu};

use super::gpu_record::{Gpus, NcclFacts, OnGpu};
use super::nccl::{ID_BYTES, Library, Nccl};
use super::pattern::Patterns;
use super::record::Line;
use super::tolerance::{Tolerance, depends_on_order};
use super::workload::Workload;
use super::{Operation, Rival};
use time::Times;

mod rows;
mod time;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Batches move about so much, in at most so many calls: the driver's queue holds more, and never makes the host wait.
const BATCH_BYTES: usize = 64 << 20;
const MOST_CALLS: usize = 100;
/// Results are compared in pieces of this size, which is a multiple of every element's.
const PIECE_BYTES: usize = 32 << 20;
/// What outputs hold before a call that is verified.
const POISON: u8 = 0xa5;
/// How long a device may take for a batch. Our kernels tell earlier of ranks that are gone; those of NCCL do not.
const PATIENCE: Duration = Duration::from_secs(120);
const NAME_BYTES: usize = 64;

/// Runs the workload as the rank that the environment says; rank 0 writes lines to standard output.
pub(super) fn run(workload: &Workload) -> std::result::Result<(), String> {
    measure(workload).map_err(|error| error.to_string())
}

fn measure(workload: &Workload) -> Result<()> {
    let local_rank = Launch::from_env()?.local_rank.unwrap_or(0);
    let ordinal = (local_rank % workload.devices) as u32;
    let mut builder = Builder::from_env()?.device(ordinal);
    if workload.reduces() {
        builder = builder.prepare(workload.dtype, workload.op)?;
    }
    if workload.has_rows() {
        builder = prepare_rows(builder, workload.dtype);
    }
    if workload.quantises() {
        builder = match workload.dtype {
            DType::F16 => builder.prepare_quantised::<f16>(),
            DType::F32 => builder.prepare_quantised::<f32>(),
            _ => builder.prepare_quantised::<bf16>(),
        };
    }
    let communicator = builder.build()?;
    let device = Device::new(ordinal)?;
    // For the whole time, so that no call has to look.
    let _current = device.enter()?;
    let queue = CudaStream::new(&device)?;
    let ranks = communicator.world_size();
    let patterns = Patterns::new(workload.dtype, ranks, 11);
    let (mut reduced, mut tolerance, mut quantised) = (Vec::new(), None, Vec::new());
    if workload.quantises() {
        quantised = patterns.quantised(workload.dtype, 0, usize::MAX)?;
    }
    if workload.reduces() {
        reduced = patterns.reduced(workload.dtype, workload.op)?;
        if depends_on_order(workload.dtype, workload.op) {
            tolerance = Some(Tolerance::new(&patterns, ranks, workload.dtype, workload.op)?);
        }
    }
    let sizes = workload.sizes.iter().copied();
    let row_bytes = workload.rows.hidden * workload.dtype.size();
    let most = match workload.has_rows() {
        true => workload.rows.tokens.iter().map(|tokens| tokens * row_bytes).max(),
        false => sizes.max(),
    };
    let most = most.unwrap_or(0);
    let parts = workload.operations.iter().map(|operation| operation.parts(ranks));
    let (parts_in, parts_out) = parts.fold((1, 1), |most, parts| (most.0.max(parts.0), most.1.max(parts.1)));
    let rank = Rank {
        source: input(&device, &patterns, communicator.rank(), most * parts_in)?,
        target: DeviceBuffer::new(&device, most * parts_out)?,
        nccl: workload.against.map(|Rival::Nccl| join_nccl(&communicator, &device)).transpose()?,
        // SAFETY: `queue` lies beside it and lives as long.
        stream: unsafe { Stream::cuda(queue.raw(), ordinal) }?,
        events: [Event::new(&device, true)?, Event::new(&device, true)?],
        workload,
        communicator,
        device: device.clone(),
        queue,
        patterns,
        reduced,
        quantised,
        tolerance,
    };
    rank.measure_all()?;
    if let Some(nccl) = rank.nccl {
        nccl.end()?;
    }
    Ok(rank.communicator.destroy()?)
}

/// What the GPUs of all ranks are, and the hash of the sources of the kernels that are measured. Collective.
pub(super) fn facts(
    communicator: &Communicator,
    device: &Device,
    workload: &Workload,
    kernels: String,
) -> Result<Gpus> {
    let ranks = communicator.world_size();
    let mut mine = [0u8; NAME_BYTES];
    mine.iter_mut().zip(device.facts().name.bytes()).for_each(|(to, from)| *to = from);
    let mut names = vec![0u8; NAME_BYTES * ranks];
    communicator.all_gather_into(&mine[..], &mut names[..])?;
    let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let version = cuda::driver::version()?;
    let explained = communicator.observer().explain().gpus.ok_or("the ranks have no GPU")?;
    Ok(Gpus {
        devices: names.chunks(NAME_BYTES).take(workload.devices).map(name).collect(),
        ranks,
        link: explained.link.name().to_owned(),
        forms_from: explained.table_from(),
        multiprocessors: explained.multiprocessors,
        driver_cuda: format!("{}.{}", version.0, version.1),
        kernels,
        nccl: None,
    })
}

/// With the kernels of rows of `dtype`.
fn prepare_rows(builder: Builder, dtype: DType) -> Builder {
    match dtype {
        DType::F16 => builder.prepare_rms_norm::<f16>(),
        _ => builder.prepare_rms_norm::<bf16>(),
    }
}

/// Memory with the input of `rank`.
fn input(device: &Device, patterns: &Patterns, rank: usize, bytes: usize) -> Result<DeviceBuffer> {
    let mut buffer = DeviceBuffer::new(device, bytes)?;
    // Pieces are whole periods, so that each begins as the first.
    let period = patterns.input(rank).len();
    let piece = PIECE_BYTES / period * period;
    let mut input = vec![0; piece.min(bytes)];
    patterns.fill(rank, &mut input);
    for at in (0..bytes).step_by(piece) {
        buffer.write(at, &input[..piece.min(bytes - at)])?;
    }
    Ok(buffer)
}

/// NCCL's own communicator; the id travels over ours.
fn join_nccl(communicator: &Communicator, device: &Device) -> Result<Nccl> {
    let library = Library::find()?;
    let mut id = [0; ID_BYTES];
    if communicator.rank() == 0 {
        id = library.unique_id()?;
    }
    communicator.broadcast(&mut id, 0)?;
    Ok(Nccl::new(library, device, (communicator.rank(), communicator.world_size()), id)?)
}

struct Rank<'a> {
    workload: &'a Workload,
    communicator: Communicator,
    device: Device,
    queue: CudaStream,
    /// The same, for our calls.
    stream: Stream,
    events: [Event; 2],
    /// The input, and room for the output, of the largest size. Smaller ones are their beginnings: the input repeats.
    source: DeviceBuffer,
    target: DeviceBuffer,
    nccl: Option<Nccl>,
    patterns: Patterns,
    /// A period of the reduction of all inputs, and how far other orders may be from it.
    reduced: Vec<u8>,
    tolerance: Option<Tolerance>,
    /// What whole groups of the quantised sum give, until they repeat.
    quantised: Vec<u8>,
}

/// Whose call it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    Ours,
    Nccl,
}

/// What is called.
#[derive(Clone, Copy)]
struct Job {
    operation: Operation,
    /// A part.
    bytes: usize,
    /// How many of them each rank gives, and gets, or would if it were the root.
    parts: (usize, usize),
    /// Calls of a batch, and of a graph.
    calls: usize,
}

/// One part in the measurement of a size: that of a library, or of an operation to compare with.
struct Contender {
    whose: Whose,
    job: Job,
    graph: Graph,
    is_exact: bool,
    wrong: u64,
    times: Times,
}

impl Rank<'_> {
    fn measure_all(&self) -> Result<()> {
        let sizes = |operation: Operation| {
            let sizes = &self.workload.sizes;
            if operation == Operation::Barrier { vec![0] } else { sizes.clone() }
        };
        if self.workload.has_rows() {
            let rank = self.communicator.rank();
            Line::Ready { sizes: self.workload.rows.tokens.len() as u64 }.tell(rank);
            Line::Gpus(self.gpus()?).tell(rank);
            return self.measure_rows();
        }
        let operations = &self.workload.operations;
        let all: usize = operations.iter().map(|operation| sizes(*operation).len()).sum();
        let rank = self.communicator.rank();
        Line::Ready { sizes: all as u64 }.tell(rank);
        Line::Gpus(self.gpus()?).tell(rank);
        for operation in operations {
            for bytes in sizes(*operation) {
                let measured = self.measure(*operation, bytes)?;
                Line::GpuSize(Box::new(measured)).tell(rank);
            }
        }
        Ok(())
    }

    fn gpus(&self) -> Result<Gpus> {
        let nccl = self.nccl.as_ref().map(|nccl| NcclFacts {
            version: nccl.library().version().to_owned(),
            path: nccl.library().path().display().to_string(),
            may_use_nvls: std::env::var("NCCL_NVLS_ENABLE").as_deref() != Ok("0"),
        });
        let facts = facts(&self.communicator, &self.device, self.workload, gpu::kernels::sources_hash())?;
        Ok(Gpus { nccl, ..facts })
    }

    fn measure(&self, operation: Operation, bytes: usize) -> Result<OnGpu> {
        let job = self.job(operation, bytes);
        let kind = operation.kind(self.workload.op);
        let is_ring = operation == Operation::SendRecv;
        // Its sends and receives are older than all that it may lack.
        let lacks = self.nccl.as_ref().filter(|_| !is_ring);
        let lacks = lacks.and_then(|nccl| nccl.lacks(kind, self.workload.dtype));
        let mut contenders = vec![self.contender(Whose::Ours, &job)?];
        let is_quantised = operation == Operation::AllReduceQuantised;
        if is_quantised {
            contenders.push(self.contender(Whose::Ours, &self.job(Operation::AllReduce, bytes))?);
        }
        if self.nccl.is_some() && lacks.is_none() {
            contenders.push(self.contender(Whose::Nccl, &job)?);
        }
        let rounds = self.measure_rounds(&mut contenders)?;
        let mut sides = Vec::new();
        for contender in contenders {
            sides.push(self.side(contender)?);
        }
        let mut sides = sides.into_iter();
        let Some(ours) = sides.next() else { unreachable!("ours is always measured") };
        let kind = if is_ring { Some(self.ring()) } else { kind };
        let launch =
            kind.and_then(|kind| self.communicator.gpu_choice(kind, bytes, self.workload.dtype.size()));
        Ok(OnGpu {
            operation: operation.name().to_owned(),
            bytes: bytes as u64,
            form: launch.map_or("flags", |launch| launch.form.name()).to_owned(),
            blocks: launch.map_or(1, |launch| launch.workers()),
            threads: launch.map_or(0, |launch| launch.threads),
            tile: launch.map_or(0, |launch| launch.tile),
            multiprocessors: launch.map_or(1, |launch| launch.multiprocessors()),
            rounds: rounds as u64,
            batch: job.calls as u64,
            ours,
            plain: if is_quantised { sides.next() } else { None },
            nccl: sides.next(),
            nccl_lacks: lacks,
        })
    }

    fn job(&self, operation: Operation, bytes: usize) -> Job {
        let parts = operation.parts(self.communicator.world_size());
        let calls = (BATCH_BYTES / (bytes * parts.0).max(1)).clamp(2, MOST_CALLS);
        Job { operation, bytes, parts, calls }
    }

    /// Verifies a library's call, and ours in a graph, too: that of NCCL is only launched once.
    fn contender(&self, whose: Whose, job: &Job) -> Result<Contender> {
        let is_exact = self.is_exact(whose, job);
        self.poison(job)?;
        self.call(whose, job)?;
        let mut wrong = self.wrong(job, is_exact)?;
        self.queue.begin_capture()?;
        let mut captured = Ok(());
        for _ in 0..job.calls {
            captured = captured.and_then(|()| self.call(whose, job));
        }
        // The stream is given back to its work, whatever the calls answered.
        let graph = self.queue.end_capture();
        captured?;
        let graph = graph?;
        if whose == Whose::Ours {
            self.poison(job)?;
        }
        graph.launch(&self.queue)?;
        if whose == Whose::Ours {
            wrong += self.wrong(job, is_exact)?;
        }
        self.settle()?;
        Ok(Contender { whose, job: *job, graph, is_exact, wrong, times: Times::default() })
    }

    /// Whether the result has the bits of the reference: what is not rounded, and our own sums but for the ring's order.
    fn is_exact(&self, whose: Whose, job: &Job) -> bool {
        let Some(kind) = job.operation.kind(self.workload.op) else { return true };
        let choice = self.communicator.gpu_choice(kind, job.bytes, self.workload.dtype.size());
        let is_ordered = whose == Whose::Ours && choice.is_none_or(|launch| launch.form != Form::Ring);
        !job.operation.reduces() || self.tolerance.is_none() || is_ordered
    }

    fn poison(&self, job: &Job) -> Result<()> {
        // SAFETY: the buffer is as long, and lives until the stream was waited for.
        unsafe { self.queue.fill(self.target.address(), POISON, job.bytes * job.parts.1) }?;
        // Nobody writes to us before this is done.
        self.settle()?;
        Ok(self.communicator.barrier()?)
    }

    /// Every rank sends to the next and receives from the previous one.
    fn ring(&self) -> Kind {
        let (rank, ranks) = (self.communicator.rank(), self.communicator.world_size());
        Kind::SendRecv { to: ((rank + 1) % ranks) as u32, from: ((rank + ranks - 1) % ranks) as u32, tag: 0 }
    }

    fn call(&self, whose: Whose, job: &Job) -> Result<()> {
        if job.operation == Operation::SendRecv {
            return self.call_kind(self.ring(), whose, job);
        }
        let Some(kind) = job.operation.kind(self.workload.op) else {
            return Ok(self.communicator.on(&self.stream).barrier()?);
        };
        self.call_kind(kind, whose, job)
    }

    fn call_kind(&self, kind: Kind, whose: Whose, job: &Job) -> Result<()> {
        let dtype = self.workload.dtype;
        if let (Whose::Nccl, Some(nccl)) = (whose, &self.nccl) {
            let both = (self.source.address(), self.target.address());
            // SAFETY: the buffers are as long as the call needs, and live until the stream was waited for.
            return Ok(unsafe { nccl.submit(kind, dtype, job.bytes / dtype.size(), both, &self.queue) }?);
        }
        let raw = |buffer: &DeviceBuffer, parts: usize| RawBuffer {
            ptr: buffer.address(),
            count: job.bytes / dtype.size() * parts,
            dtype,
            place: Place::Cuda { ordinal: self.device.ordinal() },
        };
        let is_root = kind.root().is_none_or(|root| root as usize == self.communicator.rank());
        let (gives, gets) = match job.operation {
            Operation::Scatter => (is_root, true),
            Operation::Reduce | Operation::Gather => (true, is_root),
            _ => (true, true),
        };
        let both = [
            raw(&self.source, if gives { job.parts.0 } else { 0 }),
            raw(&self.target, if gets { job.parts.1 } else { 0 }),
        ];
        // SAFETY: as above.
        let call = unsafe { Call::from_raw(kind, &both, &[]) };
        Ok(self.communicator.on(&self.stream).submit(call)?)
    }

    /// Waits for all that was submitted, and asks how it went.
    fn settle(&self) -> Result<()> {
        let start = Instant::now();
        while !self.queue.is_idle()? {
            if start.elapsed() > PATIENCE {
                give_up(self.communicator.rank());
            }
        }
        Ok(self.communicator.check()?)
    }

    /// Elements of our output that are wrong.
    fn wrong(&self, job: &Job, is_exact: bool) -> Result<u64> {
        self.settle()?;
        let rank = self.communicator.rank();
        match job.operation {
            Operation::Barrier => return Ok(0),
            Operation::Reduce | Operation::Gather if rank != 0 => return Ok(0),
            _ => {}
        }
        let (dtype, is_quantised) = (self.workload.dtype, job.operation == Operation::AllReduceQuantised);
        let count = job.bytes / dtype.size();
        let mut got = vec![0; PIECE_BYTES.min(job.bytes)];
        let mut wrong = 0;
        for part in 0..job.parts.1 {
            let (expected, begin) = self.patterns.expected(job.operation, &self.reduced, (rank, part, count));
            for at in (0..job.bytes).step_by(PIECE_BYTES) {
                let piece = &mut got[..PIECE_BYTES.min(job.bytes - at)];
                self.target.read(part * job.bytes + at, piece)?;
                let first = begin + at / dtype.size();
                wrong += match &self.tolerance {
                    _ if is_quantised => {
                        self.patterns.wrong_quantised(dtype, (&self.quantised, first), piece)?
                    }
                    Some(tolerance) if !is_exact => tolerance.wrong_from(first, piece),
                    _ => self.patterns.wrong_from(expected, first, piece),
                };
            }
        }
        Ok(wrong)
    }
}

/// Ends the process: the memory that a waiting kernel uses cannot be freed, nor its stream be left.
fn give_up(rank: usize) -> ! {
    let patience = PATIENCE.as_secs();
    // Whoever closed it does not want to know.
    let _ = writeln!(std::io::stderr(), "rank {rank}: its GPU is not done after {patience} s");
    std::process::exit(i32::from(super::EXIT_WRONG));
}
