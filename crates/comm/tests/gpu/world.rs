//! A world of ranks on GPUs, driven by one thread, and what a case gives in it.

pub(crate) use crate::case::{Case, Operation};
use crate::case::{expected, input};

use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{Builder, Call, Communicator, Operations, Place, RawBuffer, Stream};
use unisono_core::device::Form;

/// How long calls of tests wait.
pub(crate) const PATIENCE: Option<Duration> = Some(Duration::from_secs(20));

/// The devices of this machine; none, and said so, where there is none.
pub(crate) fn devices() -> Vec<u32> {
    match unisono::cuda::driver::device_count() {
        Ok(count) => (0..count).collect(),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            Vec::new()
        }
    }
}

pub(crate) struct World {
    pub(crate) ranks: Vec<Communicator>,
    pub(crate) streams: Vec<Stream>,
    pub(crate) raw_streams: Vec<CudaStream>,
    pub(crate) devices: Vec<Device>,
}

/// A case, and what it is carried out with.
struct Prepared {
    case: Case,
    form: Option<Form>,
    /// The form that it takes.
    taken: Option<Form>,
    /// Bytes before each buffer.
    offset: usize,
    inputs: Vec<Vec<u8>>,
    /// Of each rank: input, output, and what the latter holds before.
    memory: Vec<(DeviceBuffer, DeviceBuffer, Vec<u8>)>,
}

impl World {
    /// Ranks that are dealt to `devices` in turn.
    pub(crate) fn new(ranks: usize, devices: &[u32], configure: impl FnOnce(Builder) -> Builder) -> Self {
        let chosen: Vec<u32> = (0..ranks).map(|rank| devices[rank % devices.len()]).collect();
        let builder = configure(Communicator::builder().timeout(PATIENCE));
        let communicators = builder.local(&chosen).unwrap();
        let devices: Vec<Device> = chosen.iter().map(|ordinal| Device::new(*ordinal).unwrap()).collect();
        let raw_streams: Vec<_> = devices.iter().map(|device| CudaStream::new(device).unwrap()).collect();
        let streams = raw_streams.iter().map(|stream| {
            // SAFETY: the raw stream lies beside this one and lives as long.
            unsafe { Stream::cuda(stream.raw(), stream.device().ordinal()) }.unwrap()
        });
        Self { streams: streams.collect(), ranks: communicators, raw_streams, devices }
    }

    /// Runs a case and compares every byte of every rank's output, those around it included.
    pub(crate) fn check(&self, case: &Case, form: Option<Form>) {
        let mut prepared = self.prepare(case, form);
        self.submit(&prepared);
        self.wait(&format!("{case:?} {form:?} of {} ranks", self.ranks.len()));
        self.compare(&mut prepared);
    }

    /// The same for many calls that follow each other at once; `choose` brings about that the next one takes its form.
    pub(crate) fn check_all(
        &mut self,
        cases: &[(Case, Option<Form>)],
        choose: impl Fn(&mut Self, Option<Form>),
    ) {
        // Nothing is allocated while kernels wait for each other.
        let mut prepared = Vec::new();
        for (case, form) in cases {
            choose(self, *form);
            prepared.push(self.prepare(case, *form));
        }
        for prepared in &prepared {
            choose(self, prepared.form);
            self.submit(prepared);
        }
        self.wait("calls that follow each other");
        prepared.iter_mut().for_each(|prepared| self.compare(prepared));
    }

    /// Makes the buffers of a case.
    fn prepare(&self, case: &Case, form: Option<Form>) -> Prepared {
        let ranks = self.ranks.len();
        let (bytes, size) = (case.most_bytes(ranks), case.dtype.size());
        let offset = case.offset.next_multiple_of(size);
        let inputs: Vec<Vec<u8>> = (0..ranks).map(|rank| input(case, rank, ranks)).collect();
        let taken = self.ranks[0].gpu_choice(case.kind(0), bytes, size).map(|launch| launch.form);
        // Copy engines serve ranks that have a device each, and not all devices have lines.
        let is_shared = (1..ranks).any(|rank| self.devices[..rank].contains(&self.devices[rank]));
        let have_lines = self.ranks[0].gpu_rules().is_some_and(|rules| rules.have_lines());
        let must_be = form.is_some_and(|form| {
            form.serves(case.kind(0))
                && !(form == Form::Engine && is_shared)
                && (!form.is_lines() || have_lines)
        });
        assert!(
            !must_be || ranks == 1 || bytes == 0 || taken == form || bytes > 64 << 10,
            "{case:?} {taken:?} {form:?}"
        );
        let mut memory = Vec::new();
        for (rank, input) in inputs.iter().enumerate() {
            let shape = case.shape(rank, ranks);
            let mut target =
                DeviceBuffer::new(&self.devices[rank], offset + shape.room() * size + 64).unwrap();
            let mut source = DeviceBuffer::new(&self.devices[rank], offset + input.len() + 64).unwrap();
            source.write(0, &vec![0x5a; source.bytes()]).unwrap();
            source.write(offset, input).unwrap();
            let mut before = vec![0xa5; target.bytes()];
            if shape.is_in_place {
                before[offset + shape.input_at * size..][..input.len()].copy_from_slice(input);
            }
            target.write(0, &before).unwrap();
            memory.push((source, target, before));
        }
        Prepared { case: *case, form, taken, offset, inputs, memory }
    }

    fn submit(&self, Prepared { case, offset, memory, .. }: &Prepared) {
        for (rank, (source, target, _)) in memory.iter().enumerate() {
            let raw = |buffer: &DeviceBuffer| RawBuffer {
                ptr: buffer.address() + *offset as u64,
                count: 0,
                dtype: case.dtype,
                place: Place::Cuda { ordinal: self.devices[rank].ordinal() },
            };
            let shape = case.shape(rank, self.ranks.len());
            let buffers = shape.buffers(raw(source), raw(target));
            // SAFETY: both buffers live until the streams were waited for, behind this.
            let call = unsafe { Call::from_raw(case.kind(rank), &buffers, &shape.views()) };
            self.ranks[rank].on(&self.streams[rank]).submit(call).unwrap();
        }
    }

    /// Once the streams were waited for.
    fn compare(&self, Prepared { case, form, taken, offset, inputs, memory }: &mut Prepared) {
        let (ranks, size, offset) = (self.ranks.len(), case.dtype.size(), *offset);
        for (rank, (_, target, before)) in memory.iter_mut().enumerate() {
            // In place, what is not written stays as it was.
            let shape = case.shape(rank, ranks);
            for (at, piece) in expected(case, inputs, *taken, rank) {
                let begin = offset + (shape.output_at + at) * size;
                before[begin..][..piece.len()].copy_from_slice(&piece);
            }
            let mut got = vec![0; target.bytes()];
            target.read(0, &mut got).unwrap();
            let wrong = before.iter().zip(&got).position(|(expected, got)| expected != got);
            let place = wrong.map(|at| (at, before[at], got[at]));
            assert_eq!(
                place, None,
                "{case:?} {form:?} on rank {rank} of {ranks}: byte from {offset}, expected, got"
            );
        }
    }

    pub(crate) fn barrier(&self) {
        for (rank, stream) in self.ranks.iter().zip(&self.streams) {
            rank.on(stream).barrier().unwrap();
        }
        self.wait("barrier");
    }

    fn wait(&self, what: &str) {
        self.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
        for rank in &self.ranks {
            rank.check().unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }

    /// Ends all communicators together.
    pub(crate) fn end(self) {
        std::thread::scope(|scope| {
            let ends: Vec<_> = self.ranks.into_iter().map(|rank| scope.spawn(|| rank.destroy())).collect();
            ends.into_iter().for_each(|end| end.join().unwrap().unwrap());
        });
    }
}

/// Runs `work` on every rank of a world that `configure` tells of, dealt to the devices in turn, each on a thread of its own. What
/// they work with is made before, by rank and device, and goes when all are done. Nothing happens without a device.
pub(crate) fn on_threads<T: Send>(
    ranks: usize,
    configure: impl FnOnce(Builder) -> Builder,
    tools: impl Fn(usize, u32) -> T,
    work: impl Fn(Communicator, &mut T) + Sync,
) {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let chosen: Vec<u32> = (0..ranks).map(|rank| devices[rank % devices.len()]).collect();
    let world = configure(Communicator::builder()).local(&chosen).unwrap();
    let mut tools: Vec<T> = chosen.iter().enumerate().map(|(rank, ordinal)| tools(rank, *ordinal)).collect();
    let work = &work;
    std::thread::scope(|scope| {
        for (rank, tools) in world.into_iter().zip(&mut tools) {
            scope.spawn(move || work(rank, tools));
        }
    });
}
