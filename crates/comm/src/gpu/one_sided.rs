//! One-sided memory on devices: the host's copies and signals, and what users' kernels are given. The other side is
//! `kernels/device.cuh`.
//!
//! The copy of each rank lies on its GPU, its signal slots behind it. The host moves data with a copy engine, on a stream that
//! waits for no other, and waits for that alone: some ten microseconds for each access, whatever kernels are at work.

use std::cell::RefMut;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisono_core::device::layout::MAX_RANKS;
use unisono_core::layout::{SIGNAL_STRIDE, WindowLayout};
use unisono_cuda::capture::Kept;
use unisono_cuda::{RegisteredHost, Stream};
use unisono_sync::Stopped;

use super::Gpu;
use super::attach::all_or_none;
use super::watch::{lost_context, side_stream};
use super::windows::Mappings;
use crate::communicator::Communicator;
use crate::control::Control;
use crate::error::{Error, Result};

/// Where, from a slot on, a kernel says that it waited in vain for that signal: one more than the place of a packet (0 if nobody
/// did), what it expected and what was there, and how long it waited; words of 64 bits.
pub(super) const MISSED_SIGNAL_AT: usize = 8;
/// The same of a packet, from the first slot on.
pub(super) const MISSED_PACKET_AT: usize = MISSED_SIGNAL_AT + MISSED_BYTES;
const MISSED_BYTES: usize = 24;
/// The first word while a thread writes the other two: it was the first to miss something there, and others keep out.
pub(super) const MISSED_UNTOLD: u64 = u64::MAX;
const _: () = assert!(MISSED_PACKET_AT + MISSED_BYTES <= SIGNAL_STRIDE);

/// One-sided memory as kernels of one rank reach it: `unisono::Symmetric` of the header
/// [`device_header`](crate::gpu::device_header()), by value. Made by [`Symmetric::device_view`](crate::Symmetric::device_view).
///
/// It may stand in a larger `repr(C)` structure, where it begins on 8 bytes. It keeps nothing alive.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DeviceView {
    /// Where the copy of each rank begins.
    copies: [u64; MAX_RANKS],
    /// Bytes from there to its signal slots.
    signals_at: u64,
    /// The word that ends all waits.
    abort: u64,
    bytes: u64,
    /// 0 is for ever.
    patience_ns: u64,
    rank: u32,
    ranks: u32,
}

impl DeviceView {
    /// With waits that last so long; `None` waits until the communicator fails. By default it is the timeout of the communicator.
    #[must_use]
    pub fn with_patience(self, patience: Option<Duration>) -> Self {
        Self { patience_ns: nanoseconds(patience), ..self }
    }
}

/// At least one, if there is a limit.
pub(crate) fn nanoseconds(patience: Option<Duration>) -> u64 {
    patience.map_or(0, |patience| patience.as_nanos().clamp(1, u64::MAX.into()) as u64)
}

/// A wait of a kernel that ended by its patience.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Missed {
    /// The byte among our signals at which it stands.
    at: usize,
    /// For packets.
    place: u64,
    expected: u32,
    got: u32,
    waited: Duration,
}

impl Missed {
    /// The first one beside our signals.
    fn find(pad: &[u8]) -> Option<Self> {
        let slots = (0..pad.len() / SIGNAL_STRIDE).map(|slot| slot * SIGNAL_STRIDE + MISSED_SIGNAL_AT);
        slots.chain([MISSED_PACKET_AT]).find_map(|at| {
            let (words, _) = pad.get(at..at + MISSED_BYTES)?.as_chunks();
            let word = |at: usize| u64::from_le_bytes(words[at]);
            let first = Some(word(0)).filter(|first| *first != MISSED_UNTOLD)?;
            let (place, values, waited) = (first.checked_sub(1)?, word(1), Duration::from_nanos(word(2)));
            Some(Self { at, place, expected: (values >> 32) as u32, got: values as u32, waited })
        })
    }

    fn into_error(self, rank: usize) -> Error {
        let Self { at, place, expected, got, waited } = self;
        match at {
            MISSED_PACKET_AT => Error::Packet { rank, place, expected, got, waited },
            _ => Error::Signal { rank, slot: at / SIGNAL_STRIDE, expected, got, waited },
        }
    }
}

/// One-sided memory on the devices of all ranks.
#[derive(Debug)]
pub(crate) struct OneSided {
    stream: Arc<Stream>,
    layout: WindowLayout,
    patience_ns: u64,
    /// The communicator has a clone of this `Arc` for as long as it keeps the memory; graphs have their own.
    reached: Arc<Reached>,
}

/// What kernels touch, kept together: the copies, and the word that ends their waits.
#[derive(Clone, Debug)]
struct Reached {
    mappings: Arc<Mappings>,
    /// Declared before what keeps these pages mapped.
    control_pages: Arc<RegisteredHost>,
    control: Arc<Control>,
}

impl OneSided {
    /// Where the copy of `peer` begins, as our device calls it.
    pub(crate) fn address(&self, peer: usize) -> u64 {
        self.reached.mappings.addresses()[peer]
    }

    /// Copies what lies from byte `at` of the copy of `peer` on.
    pub(crate) fn read(&self, peer: usize, at: usize, bytes: &mut [u8]) -> Result<()> {
        self.check(at, bytes.len());
        // SAFETY: the range lies in the mapping, which we hold; whoever writes there meanwhile is another device or engine.
        unsafe { self.stream.read(self.address(peer) + at as u64, bytes) }.map_err(|error| self.failed(error))
    }

    /// Copies `bytes` to byte `at` of the copy of `peer` and on.
    pub(crate) fn write(&self, peer: usize, at: usize, bytes: &[u8]) -> Result<()> {
        self.check(at, bytes.len());
        // SAFETY: as above.
        unsafe { self.stream.write(self.address(peer) + at as u64, bytes) }
            .map_err(|error| self.failed(error))
    }

    /// Sets `slot` of `peer`. What we wrote before is there: each write was waited for.
    pub(crate) fn signal(&self, peer: usize, slot: usize, value: u32) -> Result<()> {
        // SYNC: what came before a signal, to whichever copy, is visible after it.
        self.write(peer, self.slot(slot), &value.to_le_bytes())
    }

    /// As [`OneSided::signal`], in the order of `stream`.
    pub(crate) fn signal_on(&self, stream: &Stream, peer: usize, slot: usize, value: u32) -> Result<()> {
        let rank = self.rank();
        if stream.device() != self.stream.device() {
            let expected = format!("one of cuda:{}", self.stream.device().ordinal());
            let got = format!("one of cuda:{}", stream.device().ordinal());
            return Err(Error::Argument { call: "signal_on", rank, what: "stream", expected, got });
        }
        self.keep_if_captured(stream).map_err(|error| self.failed(error))?;
        // SYNC: what came before a signal, to whichever copy, is visible after it.
        // SAFETY: the slot lies in the mapping, which stays until our device was waited for, or its graph is gone.
        unsafe { stream.write_word(self.address(peer) + self.slot(slot) as u64, value) }
            .map_err(|error| self.failed(error))
    }

    /// What the kernels beside a captured signal touch then stays for as long as the graph does.
    fn keep_if_captured(&self, stream: &Stream) -> unisono_cuda::Result<()> {
        // Every driver answers this one.
        if !stream.is_capturing()? {
            return Ok(());
        }
        match stream.capture()? {
            Some(capture) => capture.keep(self.kept()),
            None => Ok(()),
        }
    }

    /// What keeps all copies mapped, and the word that ends waits. Not the same `Arc` as the communicator's: who holds this waits for nobody.
    pub(crate) fn kept(&self) -> Kept {
        Arc::new((*self.reached).clone())
    }

    fn rank(&self) -> usize {
        self.reached.control.member().0
    }

    /// What our `slot` holds.
    pub(crate) fn value(&self, slot: usize) -> Result<u32> {
        let mut value = [0; 4];
        // SYNC: what came before a signal, to whichever copy, is visible after it.
        self.read(self.rank(), self.slot(slot), &mut value)?;
        Ok(u32::from_le_bytes(value))
    }

    /// Waits until our `slot` holds at least `at_least`.
    pub(crate) fn wait(
        &self,
        slot: usize,
        at_least: u32,
        timeout: Duration,
    ) -> Result<std::result::Result<(), Stopped>> {
        /// A signal that is about to come is polled for without a pause, which costs a copy each time.
        const AT_ONCE: Duration = Duration::from_millis(1);
        const PAUSE: Duration = Duration::from_micros(200);
        let start = Instant::now();
        loop {
            // Looked at before the slot: what was signalled before a failure counts.
            let is_aborted = self.reached.control.abort().raised().is_some();
            let waited = start.elapsed();
            if self.value(slot)?.wrapping_sub(at_least) < 1 << 31 {
                return Ok(Ok(()));
            }
            if is_aborted {
                return Ok(Err(Stopped::Aborted));
            }
            if waited >= timeout {
                return Ok(Err(Stopped::TimedOut { waited }));
            }
            if waited > AT_ONCE {
                std::thread::sleep(PAUSE.min(timeout.saturating_sub(waited)));
            }
        }
    }

    /// Ok, or what a kernel waited for in vain; it is forgotten then.
    pub(crate) fn take_missed(&self) -> Result<()> {
        let (rank, field) = (self.rank(), self.layout.device_signals());
        let mut pad = vec![0; field.bytes];
        self.read(rank, field.offset, &mut pad)?;
        let Some(missed) = Missed::find(&pad) else { return Ok(()) };
        self.write(rank, field.offset + missed.at, &[0; 8])?;
        Err(missed.into_error(rank))
    }

    /// What kernels are given.
    pub(crate) fn view(&self) -> DeviceView {
        let (rank, ranks) = self.reached.control.member();
        let mut copies = [0; MAX_RANKS];
        copies[..ranks].copy_from_slice(self.reached.mappings.addresses());
        DeviceView {
            copies,
            signals_at: self.layout.device_signals().offset as u64,
            abort: self.reached.control_pages.address(),
            bytes: self.layout.bytes() as u64,
            patience_ns: self.patience_ns,
            rank: rank as u32,
            ranks: ranks as u32,
        }
    }

    fn slot(&self, slot: usize) -> usize {
        self.layout.device_signals().offset + slot * SIGNAL_STRIDE
    }

    /// Whoever calls us has compared the range with the number of elements, or it is that of a slot.
    fn check(&self, at: usize, bytes: usize) {
        assert!(at + bytes <= self.layout.device_bytes(), "{bytes} bytes at {at} of {:?}", self.layout);
    }

    fn failed(&self, error: unisono_cuda::Error) -> Error {
        let control = &self.reached.control;
        if let Some(cause) = lost_context(&error, control) {
            control.fail(&cause);
        }
        Error::Cuda { rank: self.rank(), error }
    }
}

impl Drop for OneSided {
    fn drop(&mut self) {
        // In a forked child the driver answers nothing, and the memory is its parent's.
        let is_forked = self.reached.control.check_process().is_err();
        // As long as the communicator keeps the memory, it waits for kernels before it lets go. Else they may still be at work here:
        // they end in time, because the communicator ended. Nobody waits for them here; if no thread can be had, the memory stays.
        if Arc::strong_count(&self.reached) > 1 && !is_forked {
            return;
        }
        let device = self.stream.device().clone();
        let kept = ManuallyDrop::new(self.reached.clone());
        if is_forked {
            return;
        }
        let reap = move || {
            let _ = device.synchronize();
            drop(ManuallyDrop::into_inner(kept));
        };
        if let Err(error) = std::thread::Builder::new().name("unisono-reaper".to_owned()).spawn(reap) {
            tracing::warn!("one-sided memory of a GPU is not given back: {error}");
        }
    }
}

impl Communicator {
    /// Makes window `id`, in memory of devices, one-sided; `count` elements of `size` bytes. It is ours. Collective, with
    /// [`Communicator::end_window`] in it: all ranks have their one-sided memory, or all get an error and the memory is gone.
    pub(crate) fn make_one_sided(&self, id: u64, (count, size): (usize, usize)) -> Result<OneSided> {
        let layout = WindowLayout::new(self.world_size(), count, size)?;
        let one_sided = match &self.gpu {
            Some(gpu) => gpu.borrow().one_sided(id, layout),
            None => Err(no_window(self.rank(), id)),
        };
        // Whoever fails here still takes part: the others wait for it.
        self.end_window(unisono_core::call::Kind::Symmetric, id, &self.control)?;
        let windows = || self.gpu.as_ref().map(|gpu| RefMut::map(gpu.borrow_mut(), |gpu| &mut gpu.windows));
        if let (Ok(one_sided), Some(mut windows)) = (&one_sided, windows()) {
            windows.keep(id, one_sided.reached.clone());
        }
        let undo = |one_sided| {
            drop(one_sided);
            // Nothing was given to its stream: it goes at once.
            if let Some(mut windows) = windows() {
                windows.close(id);
            }
        };
        all_or_none(one_sided, self.rank(), undo, &|ours| self.least_of_all(ours, self.patience))?
    }
}

impl Gpu {
    fn one_sided(&self, id: u64, layout: WindowLayout) -> Result<OneSided> {
        let rank = self.args.rank as usize;
        let (Some(mappings), Some(memory)) = (self.windows.mappings(id), &self.memory) else {
            return Err(no_window(rank, id));
        };
        let one_sided = OneSided {
            stream: side_stream(&self.device).map_err(|error| Error::Cuda { rank, error })?,
            layout,
            patience_ns: self.args.patience_ns,
            reached: Arc::new(Reached {
                mappings,
                control_pages: memory.control_pages.clone(),
                control: self.control.clone(),
            }),
        };
        // What the driver makes for its first copies, it makes now, while no kernel waits for us.
        one_sided.write(rank, one_sided.slot(0), &[0; 4])?;
        one_sided.value(0)?;
        Ok(one_sided)
    }
}

fn no_window(rank: usize, id: u64) -> Error {
    Error::Device { rank, reason: format!("window {id} is not open on it") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_in_vain_is_found_behind_its_slot() {
        let mut pad = vec![0; 64 * SIGNAL_STRIDE];
        pad[5 * SIGNAL_STRIDE] = 9;
        assert_eq!(Missed::find(&pad), None);
        let mut tell = |at: usize, words: [u64; 3]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            pad[at..at + MISSED_BYTES].copy_from_slice(&bytes);
            Missed::find(&pad).map(|missed| missed.into_error(2))
        };
        let waited = Duration::from_millis(1500);
        let words = |place: u64| [place + 1, 7 << 32 | 6, 1_500_000_000];
        assert_eq!(tell(MISSED_PACKET_AT, [MISSED_UNTOLD, 0, 0]), None, "somebody is about to say it");
        let packet = Error::Packet { rank: 2, place: 1000, expected: 7, got: 6, waited };
        assert_eq!(tell(MISSED_PACKET_AT, words(1000)), Some(packet));
        for slot in [63, 0] {
            let signal = Error::Signal { rank: 2, slot, expected: 7, got: 6, waited };
            assert_eq!(tell(slot * SIGNAL_STRIDE + MISSED_SIGNAL_AT, words(0)), Some(signal));
        }
    }

    #[test]
    fn a_patience_is_never_rounded_to_none() {
        assert_eq!([None, Some(Duration::ZERO)].map(nanoseconds), [0, 1]);
        assert_eq!(nanoseconds(Some(Duration::MAX)), u64::MAX);
    }
}
