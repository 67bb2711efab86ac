//! A world of ranks on GPUs, driven by one thread, and what a case gives in it.

pub(crate) use crate::case::{Case, Operation};
use crate::case::{expected, input};

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{Builder, Call, Communicator, Operations, Place, RawBuffer, Stream};
use unisono_core::device::Form;

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

impl World {
    /// Ranks that are dealt to `devices` in turn.
    pub(crate) fn new(ranks: usize, devices: &[u32], configure: impl FnOnce(Builder) -> Builder) -> Self {
        let chosen: Vec<u32> = (0..ranks).map(|rank| devices[rank % devices.len()]).collect();
        let patience = Some(std::time::Duration::from_secs(20));
        let builder = configure(Communicator::builder().timeout(patience));
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
        let ranks = self.ranks.len();
        let bytes = case.count * case.dtype.size();
        let offset = case.offset.next_multiple_of(case.dtype.size());
        let is_in_place = case.is_in_place && case.can_be_in_place();
        let inputs: Vec<Vec<u8>> = (0..ranks).map(|rank| input(case, rank, ranks)).collect();
        let taken =
            self.ranks[0].gpu_choice(case.kind(0), bytes, case.dtype.size()).map(|launch| launch.form);
        let must_be = form.is_some_and(|form| form.serves(case.kind(0)));
        assert!(
            !must_be || ranks == 1 || bytes == 0 || taken == form || bytes > 64 << 10,
            "{case:?} {taken:?} {form:?}"
        );
        let mut memory = Vec::new();
        for (rank, input) in inputs.iter().enumerate() {
            let (parts_in, parts_out) = case.parts(rank, ranks);
            let parts = if is_in_place { parts_in.max(parts_out) } else { parts_out };
            let own = if is_in_place && parts_out > parts_in { rank * bytes } else { 0 };
            let mut target = DeviceBuffer::new(&self.devices[rank], offset + bytes * parts + 64).unwrap();
            target.write(0, &vec![0xa5; target.bytes()]).unwrap();
            let mut source = DeviceBuffer::new(&self.devices[rank], offset + input.len() + 64).unwrap();
            source.write(0, &vec![0x5a; source.bytes()]).unwrap();
            match is_in_place {
                true => target.write(offset + own, input).unwrap(),
                false => source.write(offset, input).unwrap(),
            }
            memory.push((source, target));
        }
        for (rank, (source, target)) in memory.iter().enumerate() {
            let raw = |buffer: &DeviceBuffer, parts: usize| RawBuffer {
                ptr: buffer.address() + offset as u64,
                count: case.count * parts,
                dtype: case.dtype,
                place: Place::Cuda { ordinal: self.devices[rank].ordinal() },
            };
            let (parts_in, parts_out) = case.parts(rank, ranks);
            let both = [raw(source, parts_in), raw(target, parts_out)];
            let one = [raw(target, parts_in.max(parts_out))];
            let used = if is_in_place { &one[..] } else { &both[..] };
            // SAFETY: both buffers live until the streams were waited for, below.
            let call = unsafe { Call::from_raw(case.kind(rank), used, &[]) };
            self.ranks[rank].on(&self.streams[rank]).submit(call).unwrap();
        }
        self.wait(&format!("{case:?} {form:?} of {ranks} ranks"));
        for (rank, (_, target)) in memory.iter().enumerate() {
            let (parts_in, parts_out) = case.parts(rank, ranks);
            let expected = expected(case, &inputs, taken, rank);
            // In place, a rank's part of what is reduced lies where it lay; the rest stays as it was.
            let own = if is_in_place && parts_in > parts_out && parts_out > 0 { rank * bytes } else { 0 };
            let mut before = vec![0xa5; target.bytes()];
            if is_in_place && parts_in >= parts_out {
                before[offset..][..inputs[rank].len()].copy_from_slice(&inputs[rank]);
            }
            before[offset + own..][..expected.len()].copy_from_slice(&expected);
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
