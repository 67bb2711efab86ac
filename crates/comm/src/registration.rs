//! Registration: memory of a GPU that somebody else allocated joins as if it were a window, so that collectives reach it where
//! it lies.

use std::ops::Range;
use std::sync::Arc;

use unisono_core::call::CallHeader;
use unisono_core::device::Link;
use unisono_core::{DType, Element};
use unisono_sync::Deadline;

use crate::buffer::{Buf, BufMut, Place, RawBuffer};
use crate::call::{Call, Kind};
use crate::communicator::Communicator;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::gpu::foreign;
use crate::gpu::windows::Mappings;
use crate::window::Closing;

/// Bytes of what a rank tells the others of why it could not take part.
const REASON_BYTES: usize = 512;

/// This rank's share of memory that all ranks registered together: a range of its GPU's memory that it allocated itself, by
/// `cudaMalloc`, `cuMemCreate` or torch. Made by [`Communicator::register`].
///
/// Collectives whose buffers all lie in registrations (or in windows of [`Memory::Device`](crate::Memory::Device) and
/// [`Memory::Pinned`](crate::Memory::Pinned)) read and write them in place. A CUDA graph that such a call is captured into keeps the mappings of the peers' memory for as long as
/// it exists. The memory itself belongs to whoever allocated it.
///
/// Dropping it without [`Registration::close`] keeps the mappings until the communicator is gone.
#[derive(Debug)]
pub struct Registration {
    control: Arc<Control>,
    id: u64,
    address: u64,
    bytes: usize,
}

impl Registration {
    /// Its id, equal on all ranks; windows and registrations have different ones.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Length in bytes, equal on all ranks.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first byte of this rank's memory.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The elements of `range`, counted from the first byte, as an input. A call refuses what does not lie inside.
    ///
    /// # Safety
    /// They are valid, aligned to their type, and written by nobody until the stream of the operation has passed it (not:
    /// until the call returns).
    pub unsafe fn buf<T: Element>(&self, range: Range<usize>) -> Buf<'_, T> {
        Buf::new(self.raw(range.start, range.end, T::DTYPE))
    }

    /// The elements of `range` as an output, or input and output. A call refuses what does not lie inside.
    ///
    /// # Safety
    /// They are valid, aligned to their type, and touched by nobody else until the stream of the operation has passed it
    /// (not: until the call returns). The borrow does not see to that: several outputs may be made of one registration.
    pub unsafe fn buf_mut<T: Element>(&self, range: Range<usize>) -> BufMut<'_, T> {
        BufMut::new(self.raw(range.start, range.end, T::DTYPE))
    }

    /// What lies outside is described as just outside, so that no number of it overflows.
    fn raw(&self, start: usize, end: usize, dtype: DType) -> RawBuffer {
        let offset = start.saturating_mul(dtype.size()).min(self.bytes);
        let count = end.saturating_sub(start).min(self.bytes + 1);
        RawBuffer { ptr: self.address + offset as u64, count, dtype, place: Place::Window { id: self.id } }
    }

    /// Ends the registration on all ranks: when it returns, no rank maps this memory any more, except for CUDA graphs that were
    /// captured with it, and it may be freed. Collective. It waits for what this process gave to the device.
    ///
    /// Graphs keep their mappings, not the memory: what a graph reaches must stay allocated on all ranks for as long as the
    /// graph is launched.
    ///
    /// # Errors
    /// [`Error::Argument`] if `communicator` did not make this registration; [`Error::Generation`] if an earlier generation of
    /// it did; those of a failed communicator.
    pub fn close(self, communicator: &Communicator) -> Result<()> {
        communicator.close_window(self.into())
    }
}

impl From<Registration> for Closing {
    fn from(registration: Registration) -> Self {
        Self::new(registration.control, registration.id, None)
    }
}

impl Communicator {
    /// Lets memory of this rank's GPU that somebody else allocated join as if it were a window: `buffer`, and as many bytes on
    /// every other rank. Afterwards collectives on it are zero-copy. Collective: every rank calls it, with the same number of
    /// bytes; addresses, offsets in allocations and dtypes may differ. Ranks of one process call it on threads of their own,
    /// or one thread asks a group for all of them ([`Grouped::register`](crate::Grouped::register)).
    ///
    /// Memory of `cudaMalloc` and of `cuMemCreate` (exportable as a file descriptor) is taken, torch's expandable segments
    /// too; that of stream-ordered pools (`cudaMallocAsync`), managed and host memory are not. Memory that is registered again
    /// shares the mappings.
    ///
    /// ```no_run
    /// # use unisono::{Communicator, DType, Operations, Place, RawBuffer, ReduceOp, Stream, cuda};
    /// # let (rank, address, raw) = (Communicator::from_env()?, 0, std::ptr::null_mut());
    /// // 1,000 elements at an address that torch gave.
    /// let buffer = RawBuffer { ptr: address, count: 1000, dtype: DType::F32, place: Place::Cuda { ordinal: 0 } };
    /// // SAFETY: it stays allocated until `close` below.
    /// let registered = unsafe { rank.register(buffer) }?;
    /// // SAFETY: a live stream of cuda:0.
    /// let stream = unsafe { Stream::cuda(raw, 0) }?;
    /// // SAFETY: only this stream touches the memory.
    /// rank.on(&stream).all_reduce(unsafe { registered.buf_mut::<f32>(0..1000) }, ReduceOp::Sum)?;
    /// registered.close(&rank)?;
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Safety
    /// `buffer` is allocated, and stays so until the registration is closed on every rank.
    ///
    /// # Errors
    /// At once, on this rank alone: [`Error::Place`] for buffers in host memory, in windows or on another GPU;
    /// [`Error::Device`] without a GPU, or where the GPUs do not reach each other's memory; [`Error::Argument`] for an empty
    /// one. On all ranks, after which the communicator has failed: [`Error::Mismatch`] if the numbers of bytes differ.
    /// On all ranks, after which the communicator still works and nothing is registered: [`Error::Argument`] or
    /// [`Error::Cuda`] on a rank whose memory cannot be exported or that cannot map that of others, and
    /// [`Error::Registration`], which names it, on the others.
    pub unsafe fn register(&self, buffer: RawBuffer) -> Result<Registration> {
        let (rank, bytes) = (self.rank(), buffer.bytes());
        let device = self.registers_at(&buffer)?;
        let mut engine = self.engine();
        let header =
            CallHeader { dtype: Some(DType::U8), count: bytes as u64, ..CallHeader::bare(Kind::Register) };
        engine.meet(header, self.patience)?;
        let id = engine.next_window_id();
        let deadline = self.patience.map_or(Deadline::NEVER, Deadline::after);
        let is_aborted = || self.control.abort().raised().is_some();
        let what = (id as u32, buffer.ptr, bytes);
        let copies = foreign::share(&self.neighbours, &device, what, deadline, &is_aborted)
            .and_then(|exchange| exchange.map(|mut exchange| exchange.close()).transpose());
        // Either all have it or none: a rank that could not take part says why, and everybody lets go of it.
        let mut reasons = vec![0; REASON_BYTES * self.world_size()];
        tell(&mut reasons[rank * REASON_BYTES..][..REASON_BYTES], copies.as_ref().err());
        engine.submit(&Call::new(Kind::AllGather, [BufMut::from(&mut reasons).raw()]))?;
        let copies = copies?;
        if let Some((rank, reason)) = first_reason(&reasons) {
            return Err(Error::Registration { rank, reason });
        }
        let Some(copies) = copies else {
            let reason = "another rank gave no memory, and did not say why".to_owned();
            return Err(Error::Registration { rank, reason });
        };
        let addresses = copies.iter().map(|copy| copy.address).collect();
        let held: Vec<_> = copies.into_iter().map(|copy| copy.held).collect();
        if let Some(gpu) = &self.gpu {
            gpu.borrow_mut().open_window(id, bytes, Mappings::new(self.rank(), addresses, held));
        }
        Ok(Registration { control: self.control.clone(), id, address: buffer.ptr, bytes })
    }

    /// The device on which `buffer` is registered; what every rank sees without the others is refused.
    pub(crate) fn registers_at(&self, buffer: &RawBuffer) -> Result<unisono_cuda::Device> {
        let (rank, call) = (self.rank(), Kind::Register.name());
        self.control.check_process()?;
        let Some(gpu) = &self.gpu else {
            if let Place::Host | Place::Window { .. } = buffer.place {
                let expected = "memory of a GPU, to be registered".to_owned();
                return Err(Error::Place { call, rank, expected, got: buffer.place.to_string() });
            }
            return Err(crate::gpu::without_gpu(rank));
        };
        let gpu = gpu.borrow();
        let ordinal = gpu.ordinal();
        if buffer.place != (Place::Cuda { ordinal }) {
            let (expected, got) = (format!("memory of cuda:{ordinal}"), buffer.place.to_string());
            return Err(Error::Place { call, rank, expected, got });
        }
        if gpu.rules().link == Link::Host {
            let reason = "the devices do not reach each other's memory, so none can be registered".to_owned();
            return Err(Error::Device { rank, reason });
        }
        if buffer.bytes() == 0 || buffer.ptr.checked_add(buffer.bytes() as u64).is_none() {
            let (expected, got) = ("at least one byte of memory".to_owned(), format!("{buffer:?}"));
            return Err(Error::Argument { call, rank, what: "buffer", expected, got });
        }
        Ok(gpu.device().clone())
    }
}

/// Writes why this rank could not take part, if it could not; zeros if it could.
fn tell(place: &mut [u8], problem: Option<&Error>) {
    let Some(problem) = problem else { return };
    // Half a sentence, as the error that tells it has the other half.
    let text = problem.to_string();
    let text = text.trim_end_matches('.');
    let length = text.floor_char_boundary(place.len() - 1);
    place[0] = 1;
    place[1..=length].copy_from_slice(&text.as_bytes()[..length]);
}

/// The first rank that could not take part, and why.
fn first_reason(reasons: &[u8]) -> Option<(usize, String)> {
    let mut all = reasons.chunks(REASON_BYTES).enumerate();
    let (rank, reason) = all.find(|(_, reason)| reason.first() != Some(&0))?;
    let text = reason[1..].split(|byte| *byte == 0).next().unwrap_or_default();
    Some((rank, String::from_utf8_lossy(text).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rank_that_cannot_take_part_is_told_with_its_reason() {
        let mut reasons = vec![0; 3 * REASON_BYTES];
        assert_eq!(first_reason(&reasons), None);
        let long = Error::Device { rank: 2, reason: "é".repeat(600) };
        tell(&mut reasons[2 * REASON_BYTES..], Some(&long));
        let (rank, reason) = first_reason(&reasons).unwrap();
        assert_eq!(rank, 2);
        assert!(long.to_string().starts_with(&reason) && reason.len() > REASON_BYTES - 3, "{reason}");
        let short = Error::Device { rank: 1, reason: "no".into() };
        tell(&mut reasons[REASON_BYTES..2 * REASON_BYTES], Some(&short));
        tell(&mut reasons[..REASON_BYTES], None);
        assert_eq!(first_reason(&reasons), Some((1, short.to_string())));
    }

    #[test]
    fn host_memory_windows_and_communicators_without_a_gpu_are_refused_and_go_on() {
        use crate::{Memory, Operations, ReduceOp};
        let rank = Communicator::threads(1).unwrap().remove(0);
        // SAFETY: refused before anything is done.
        let register = |buffer: RawBuffer| unsafe { rank.register(buffer) }.unwrap_err();
        let host = vec![1.0f32; 10];
        assert_eq!(
            register(Buf::from(&host).raw()).to_string(),
            "register on rank 0 got a buffer in host memory; this communicator works on memory of a GPU, to be registered. \
             Nothing was written."
        );
        let window = rank.window::<f32>(10, Memory::Host).unwrap();
        let error = register(window.range(0..10).raw());
        assert!(matches!(&error, Error::Place { got, .. } if got == "window 1"), "{error}");
        // SAFETY: as above.
        let on_gpu = unsafe { Buf::<f32>::cuda(0x1000, 10, 0) };
        let error = register(on_gpu.raw());
        assert!(matches!(&error, Error::Device { rank: 0, .. }), "{error}");
        let mut sum = [2];
        rank.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [2]);
        rank.destroy().unwrap();
    }

    #[test]
    fn a_group_with_a_registration_that_is_refused_does_nothing() {
        use crate::{Memory, Operations, ReduceOp, Stream, group};
        let (ranks, stream) = (Communicator::threads(2).unwrap(), Stream::host());
        // SAFETY: refused before anything is done.
        let on_gpu = unsafe { Buf::<f32>::cuda(0x1000, 10, 0) }.raw();
        let mut kept = Vec::new();
        let error = group(|group| {
            for rank in &ranks {
                kept.push(group.on(rank, &stream).window::<u8>(1, Memory::Host)?);
            }
            // SAFETY: as above.
            ranks.iter().try_for_each(|rank| unsafe { group.on(rank, &stream).register(on_gpu) }.map(drop))
        })
        .unwrap_err();
        assert!(matches!(&error, Error::Device { rank: 0, .. }), "{error}");
        for window in kept {
            assert!(matches!(window.take(), Err(Error::Argument { call: "window", .. })));
        }
        let mut sums = [[1], [2]];
        group(|group| {
            let mut ranks = ranks.iter().zip(&mut sums);
            ranks.try_for_each(|(rank, sum)| group.on(rank, &stream).all_reduce(sum, ReduceOp::Sum))
        })
        .unwrap();
        assert_eq!(sums, [[3], [3]]);
        group(|group| {
            ranks.into_iter().for_each(|rank| group.destroy(rank));
            Ok(())
        })
        .unwrap();
    }
}
