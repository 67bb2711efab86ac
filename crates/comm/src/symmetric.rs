//! One-sided memory: every rank reads and writes every rank's copy at any time, and tells it by signals.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use unisono_core::Element;
use unisono_core::layout::{Field, SIGNAL_SLOTS, SIGNAL_STRIDE, WindowLayout};
use unisono_sync::memory::{words32, words64};
use unisono_sync::{SharedBytes, SignalPad, Sleepers, SpinBudget, Stopped, WaitPolicy, Watch, wait};

use crate::cause::Cause;
use crate::communicator::Communicator;
use crate::control::Control;
use crate::copies::Copies;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::gpu::one_sided::{DeviceView, OneSided};
use crate::stream::Stream;
use crate::window::{Closing, Held};

/// Where the copies lie.
#[derive(Debug)]
pub(crate) enum Parts {
    /// In host memory.
    Host(Copies),
    /// In memory of each rank's GPU.
    #[cfg(feature = "cuda")]
    Device(OneSided),
}

/// The same number of elements on every rank, which all ranks may touch at any time: by copies, never by reference. Made by
/// [`Window::into_symmetric`](crate::Window::into_symmetric). Any thread may use it.
///
/// A copy may see old and new words (of 8 bytes) side by side while a peer writes. Signals bring order: what a rank wrote, to
/// whomever, before its [`Symmetric::signal`] is seen by whoever has seen the signal. Each rank has
/// [`Symmetric::SIGNAL_SLOTS`] slots, which start at 0.
///
/// Of a window of [`Memory::Device`](crate::Memory::Device) the copies and the signals lie on the GPUs. The host reaches them all the
/// same, with a copy engine: some ten microseconds for each access, complete on return, whatever kernels are at work. Bytes that are
/// written while they are read come out old or new, one by one. Kernels of one's own reach all copies, and signal and wait as the
/// host does, with the header that [`device_header`](crate::device_header()) gives and [`Symmetric::device_view`].
///
/// ```
/// # use std::time::Duration;
/// # use unisono::{Communicator, Memory, Operations};
/// # let ranks = Communicator::threads(2)?;
/// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
/// let shared = rank.window::<f32>(1000, Memory::Host)?.into_symmetric(&rank)?;
/// let next = (rank.rank() + 1) % rank.world_size();
/// shared.write(next, 10, &[1.5, 2.5])?;
/// shared.signal(next, 0, 1)?;
/// shared.wait_signal(0, 1, Duration::from_secs(10))?;
/// let mut mine = [0.0; 2];
/// shared.read(rank.rank(), 10, &mut mine)?;
/// assert_eq!(mine, [1.5, 2.5]);
/// shared.close(&rank)?;
/// # rank.destroy() })).collect();
/// # for rank in ranks { rank.join().unwrap()?; }
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Debug)]
pub struct Symmetric<T: Element> {
    control: Arc<Control>,
    parts: Parts,
    id: u64,
    count: usize,
    /// How the communicator waits.
    policy: WaitPolicy,
    elem: PhantomData<T>,
}

impl<T: Element> Symmetric<T> {
    /// Signal slots of each rank.
    pub const SIGNAL_SLOTS: usize = SIGNAL_SLOTS;

    pub(crate) fn new(
        control: Arc<Control>,
        parts: Parts,
        (id, count): (u64, usize),
        policy: WaitPolicy,
    ) -> Self {
        Self { control, parts, id, count, policy, elem: PhantomData }
    }

    /// Elements of each copy.
    pub const fn len(&self) -> usize {
        self.count
    }

    /// True if there are none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Copies elements of `peer`'s copy, from element `at` on, to `dst`. `peer` may be this rank.
    ///
    /// # Errors
    /// [`Error::Argument`] if `peer` is no rank or the range does not lie inside; the first cause of a failed communicator;
    /// [`Error::Generation`] once it was shrunk; [`Error::Cuda`] if our GPU failed.
    pub fn read(&self, peer: usize, at: usize, dst: &mut [T]) -> Result<()> {
        let start = self.check_access("read", peer, at, dst.len())?;
        // SAFETY: elements have no padding and no invalid bit patterns, so they may be written as bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(dst.as_mut_ptr().cast(), size_of_val(dst)) };
        match &self.parts {
            Parts::Host(copies) => bytes_of(copies, peer).read(start, bytes),
            #[cfg(feature = "cuda")]
            Parts::Device(copies) => copies.read(peer, start, bytes)?,
        }
        Ok(())
    }

    /// Copies `src` to elements of `peer`'s copy, from element `at` on.
    ///
    /// # Errors
    /// As [`Symmetric::read`].
    pub fn write(&self, peer: usize, at: usize, src: &[T]) -> Result<()> {
        let start = self.check_access("write", peer, at, src.len())?;
        // SAFETY: elements have no padding, so all their bytes may be read.
        let bytes = unsafe { std::slice::from_raw_parts(src.as_ptr().cast(), size_of_val(src)) };
        match &self.parts {
            Parts::Host(copies) => bytes_of(copies, peer).write(start, bytes),
            #[cfg(feature = "cuda")]
            Parts::Device(copies) => copies.write(peer, start, bytes)?,
        }
        Ok(())
    }

    /// Sets signal `slot` of `peer` to `value`. A slot has one writer at a time, and its values grow (they may wrap).
    ///
    /// # Errors
    /// [`Error::Argument`] if `peer` is no rank or has no such slot; the first cause of a failed communicator; [`Error::Cuda`] if
    /// our GPU failed.
    pub fn signal(&self, peer: usize, slot: usize, value: u32) -> Result<()> {
        self.check_access("signal", peer, 0, 0)?;
        self.check_slot("signal", slot)?;
        match &self.parts {
            Parts::Host(copies) => {
                let pad = pad(copies, peer);
                let Some(word) = pad.word(slot) else { return Err(self.no_such_slot("signal", slot)) };
                pad.signal(slot, value);
                sleepers(copies, peer).wake(word);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Parts::Device(copies) => copies.signal(peer, slot, value),
        }
    }

    /// As [`Symmetric::signal`], in the order of `stream`: after everything that the stream did before, to whichever copy. On the
    /// host's stream that is at once. On a stream of our GPU, for memory of GPUs, it returns when it is enqueued, and can be
    /// captured in CUDA graphs, which then keep the memory, and the word that ends the waits of kernels beside it.
    ///
    /// # Errors
    /// As [`Symmetric::signal`]; [`Error::Place`] if the memory lies on the host and the stream is that of a GPU;
    /// [`Error::Argument`] if it is that of another one.
    pub fn signal_on(&self, stream: &Stream, peer: usize, slot: usize, value: u32) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(stream) = stream.as_cuda() {
            self.check_access("signal_on", peer, 0, 0)?;
            self.check_slot("signal_on", slot)?;
            return match &self.parts {
                Parts::Device(copies) => copies.signal_on(stream, peer, slot, value),
                Parts::Host(_) => Err(self.not_on_devices("signal_on")),
            };
        }
        let _ = stream;
        self.signal(peer, slot, value)
    }

    /// What signal `slot` of this rank holds; 0 before the first signal.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such slot; [`Error::Cuda`] if our GPU failed.
    pub fn signal_value(&self, slot: usize) -> Result<u32> {
        self.check_slot("signal_value", slot)?;
        match &self.parts {
            Parts::Host(copies) => {
                let value = pad(copies, self.rank()).value(slot);
                value.ok_or_else(|| self.no_such_slot("signal_value", slot))
            }
            #[cfg(feature = "cuda")]
            Parts::Device(copies) => {
                self.control.check_process()?;
                copies.value(slot)
            }
        }
    }

    /// Waits until signal `slot` of this rank holds at least `at_least` (or up to 2³¹ more, modulo 2³²).
    ///
    /// # Errors
    /// [`Error::Signal`] after `timeout`; the first cause of a failure, also of a rank that left without `destroy`;
    /// [`Error::Argument`] if there is no such slot; [`Error::Cuda`] if our GPU failed.
    pub fn wait_signal(&self, slot: usize, at_least: u32, timeout: Duration) -> Result<()> {
        let rank = self.rank();
        self.check_peer("wait_signal", rank)?;
        self.check_slot("wait_signal", slot)?;
        let stopped = match &self.parts {
            Parts::Host(copies) => {
                let pad = pad(copies, rank);
                let Some(word) = pad.word(slot) else { return Err(self.no_such_slot("wait_signal", slot)) };
                let policy = WaitPolicy { patience: Some(timeout), warn_after: None, ..self.policy };
                let (budget, sleepers) = (SpinBudget::new(&policy), sleepers(copies, rank));
                let watch = Watch { abort: self.control.abort(), word, sleepers, budget: &budget };
                wait(&policy, watch, || pad.has_reached(slot, at_least), || {})
            }
            #[cfg(feature = "cuda")]
            Parts::Device(copies) => copies.wait(slot, at_least, timeout)?,
        };
        match stopped {
            Ok(()) => Ok(()),
            Err(Stopped::TimedOut { waited }) => {
                let got = self.signal_value(slot).unwrap_or_default();
                Err(Error::Signal { rank, slot, expected: at_least, got, waited })
            }
            Err(Stopped::Aborted) => {
                if let Some(error) = self.control.outdated(self.id) {
                    return Err(error);
                }
                let unknown = || Cause::Aborted { rank: rank as u32, reason: "unknown".to_owned() };
                let cause = self.control.cause().unwrap_or_else(unknown);
                Err(cause.into_error(&format!("wait_signal on slot {slot}"), self.control.member()))
            }
        }
    }

    /// This memory as kernels of one's own on our GPU take it, by value: `unisono::Symmetric` of the header that
    /// [`device_header`](crate::device_header()) gives. `examples/device_header.rs` shows all of it.
    ///
    /// It keeps nothing alive. Whether this memory is closed or dropped, kernels that our GPU was given before are waited for (by a
    /// thread, if it is dropped). Kernels of peers must not reach for our copy any more then, and graphs with such kernels must not
    /// be launched any more.
    ///
    /// # Errors
    /// [`Error::Place`] if the memory lies on the host; [`Error::Forked`] in a forked child.
    #[cfg(feature = "cuda")]
    pub fn device_view(&self) -> Result<DeviceView> {
        self.control.check_process()?;
        match &self.parts {
            Parts::Device(copies) => Ok(copies.view()),
            Parts::Host(_) => Err(self.not_on_devices("device_view")),
        }
    }

    /// Ok, or why waits of kernels of this rank ended without what they waited for: the first cause of a failed communicator, also
    /// of a rank that left without `destroy`, or a signal or a packet that did not come within their patience, each of which is
    /// told once. Kernels that are still at work are not waited for.
    ///
    /// # Errors
    /// [`Error::Signal`] or [`Error::Packet`], after which the communicator still works; the first cause of a failure;
    /// [`Error::Generation`] once it was shrunk; [`Error::Cuda`] if our GPU failed.
    pub fn check(&self) -> Result<()> {
        self.check_access("check", self.rank(), 0, 0)?;
        if let Some(cause) = self.control.cause() {
            return Err(cause.into_error("one-sided memory", self.control.member()));
        }
        match &self.parts {
            Parts::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Parts::Device(copies) => copies.take_missed(),
        }
    }

    /// The address of `peer`'s copy, for code of one's own: as foreign memory that others write at any time. Of host memory it is
    /// that of this process; of memory of GPUs, that of our device, on which our kernels (and copies) reach the copy.
    ///
    /// # Errors
    /// [`Error::Argument`] if `peer` is no rank.
    pub fn address(&self, peer: usize) -> Result<u64> {
        self.check_peer("address", peer)?;
        Ok(match &self.parts {
            Parts::Host(copies) => copies.start(peer) as u64,
            #[cfg(feature = "cuda")]
            Parts::Device(copies) => copies.address(peer),
        })
    }

    /// What keeps the addresses of all copies valid in this process, also after [`Symmetric::close`]: for views of host memory that
    /// live longer. `None` if the memory lies on GPUs.
    pub fn mapping(&self) -> Option<Arc<dyn std::any::Any + Send + Sync>> {
        match &self.parts {
            Parts::Host(copies) => Some(Arc::new(copies.clone())),
            #[cfg(feature = "cuda")]
            Parts::Device(_) => None,
        }
    }

    /// The window that became it.
    #[cfg(feature = "cuda")]
    pub(crate) const fn id(&self) -> u64 {
        self.id
    }

    /// What keeps the copies of all ranks mapped on GPUs; `None` if they lie on the host.
    #[cfg(feature = "cuda")]
    pub(crate) fn kept(&self) -> Option<unisono_cuda::capture::Kept> {
        match &self.parts {
            Parts::Host(_) => None,
            Parts::Device(copies) => Some(copies.kept()),
        }
    }

    /// Ends this memory on all ranks and frees it. Collective.
    ///
    /// # Errors
    /// [`Error::Argument`] if `communicator` did not make it; those of a failed communicator. This rank's hold on the memory
    /// ends in any case.
    pub fn close(self, communicator: &Communicator) -> Result<()> {
        communicator.close_window(self.into())
    }

    fn rank(&self) -> usize {
        self.control.member().0
    }

    /// Checks an access to `count` elements from `at` on; where they start, in bytes.
    #[inline]
    fn check_access(&self, call: &'static str, peer: usize, at: usize, count: usize) -> Result<usize> {
        self.check_peer(call, peer)?;
        if at.checked_add(count).is_none_or(|end| end > self.count) {
            return Err(Error::Argument {
                call,
                rank: self.rank(),
                what: "range",
                expected: format!("within {} elements", self.count),
                got: format!("{count} from {at}"),
            });
        }
        if self.control.abort().raised().is_some() {
            if let Some(error) = self.control.outdated(self.id) {
                return Err(error);
            }
            match self.control.cause() {
                // Whoever left may have done all its part; a wait that misses it says so.
                None | Some(Cause::Dropped { .. }) => {}
                Some(cause) => return Err(cause.into_error(call, self.control.member())),
            }
        }
        Ok(at * size_of::<T>())
    }

    #[inline]
    fn check_peer(&self, call: &'static str, peer: usize) -> Result<()> {
        self.control.check_process()?;
        let (rank, world_size) = self.control.member();
        if peer < world_size {
            return Ok(());
        }
        let (expected, got) = (format!("below {world_size}"), peer.to_string());
        Err(Error::Argument { call, rank, what: "peer", expected, got })
    }

    #[cfg(feature = "cuda")]
    fn not_on_devices(&self, call: &'static str) -> Error {
        let expected = "one-sided memory of GPUs (Memory::Device)".to_owned();
        Error::Place { call, rank: self.rank(), expected, got: "memory of the host".to_owned() }
    }

    fn check_slot(&self, call: &'static str, slot: usize) -> Result<()> {
        if slot < SIGNAL_SLOTS { Ok(()) } else { Err(self.no_such_slot(call, slot)) }
    }

    fn no_such_slot(&self, call: &'static str, slot: usize) -> Error {
        let (expected, got) = (format!("below {SIGNAL_SLOTS}"), slot.to_string());
        Error::Argument { call, rank: self.rank(), what: "slot", expected, got }
    }
}

fn bytes_of(copies: &Copies, peer: usize) -> SharedBytes<'_> {
    let start = std::ptr::with_exposed_provenance_mut(copies.start(peer));
    let words = copies.bytes().div_ceil(8);
    // SAFETY: a copy begins on a page and has whole pages, and lives as long as `copies`; every rank touches one-sided memory by
    // 64-bit atomics only.
    SharedBytes::new(unsafe { words64(start, words) })
}

fn pad(copies: &Copies, peer: usize) -> SignalPad<'_> {
    let (start, field) = signals(copies, |layout| layout.signals(peer));
    // SAFETY: as above.
    SignalPad::new(unsafe { words64(start, field.bytes / 8) }, SIGNAL_STRIDE / 8)
}

fn sleepers(copies: &Copies, peer: usize) -> Sleepers<'_> {
    let (start, _) = signals(copies, |layout| layout.sleepers(peer));
    // SAFETY: as above; the count is accessed as a 32-bit atomic only.
    Sleepers::new(unsafe { &words32(start, 1)[0] })
}

/// A field of the memory that holds the signals.
fn signals(copies: &Copies, field: impl FnOnce(&WindowLayout) -> Field) -> (*mut u8, Field) {
    let (memory, layout) = copies.signals();
    let field = field(layout);
    // SAFETY: all fields lie in the mapping, whose length was agreed.
    (unsafe { memory.as_ptr().add(field.offset) }, field)
}

impl<T: Element> From<Symmetric<T>> for Closing {
    fn from(symmetric: Symmetric<T>) -> Self {
        let held = match symmetric.parts {
            Parts::Host(copies) => Some(Held::Host(copies)),
            // The communicator keeps them until all ranks have met.
            #[cfg(feature = "cuda")]
            Parts::Device(_) => None,
        };
        Self::new(symmetric.control, symmetric.id, held)
    }
}
