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
use crate::window::{Closing, Held};

/// The same number of elements on every rank, which all ranks may touch at any time: by copies, never by reference. Made by
/// [`Window::into_symmetric`](crate::Window::into_symmetric). Any thread may use it.
///
/// A copy may see old and new words (of 8 bytes) side by side while a peer writes. Signals bring order: what a rank wrote, to
/// whomever, before its [`Symmetric::signal`] is seen by whoever has seen the signal. Each rank has
/// [`Symmetric::SIGNAL_SLOTS`] slots, which start at 0.
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
    copies: Copies,
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
        copies: Copies,
        (id, count): (u64, usize),
        policy: WaitPolicy,
    ) -> Self {
        Self { control, copies, id, count, policy, elem: PhantomData }
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
    /// [`Error::Generation`] once it was shrunk.
    pub fn read(&self, peer: usize, at: usize, dst: &mut [T]) -> Result<()> {
        let start = self.check("read", peer, at, dst.len())?;
        // SAFETY: elements have no padding and no invalid bit patterns, so they may be written as bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(dst.as_mut_ptr().cast(), size_of_val(dst)) };
        self.bytes_of(peer).read(start, bytes);
        Ok(())
    }

    /// Copies `src` to elements of `peer`'s copy, from element `at` on.
    ///
    /// # Errors
    /// As [`Symmetric::read`].
    pub fn write(&self, peer: usize, at: usize, src: &[T]) -> Result<()> {
        let start = self.check("write", peer, at, src.len())?;
        // SAFETY: elements have no padding, so all their bytes may be read.
        let bytes = unsafe { std::slice::from_raw_parts(src.as_ptr().cast(), size_of_val(src)) };
        self.bytes_of(peer).write(start, bytes);
        Ok(())
    }

    /// Sets signal `slot` of `peer` to `value`. A slot has one writer at a time, and its values grow (they may wrap).
    ///
    /// # Errors
    /// [`Error::Argument`] if `peer` is no rank or has no such slot; the first cause of a failed communicator.
    pub fn signal(&self, peer: usize, slot: usize, value: u32) -> Result<()> {
        self.check("signal", peer, 0, 0)?;
        let pad = self.pad(peer);
        let Some(word) = pad.word(slot) else { return Err(self.no_such_slot("signal", slot)) };
        pad.signal(slot, value);
        self.sleepers(peer).wake(word);
        Ok(())
    }

    /// What signal `slot` of this rank holds; 0 before the first signal.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such slot.
    pub fn signal_value(&self, slot: usize) -> Result<u32> {
        self.pad(self.rank()).value(slot).ok_or_else(|| self.no_such_slot("signal_value", slot))
    }

    /// Waits until signal `slot` of this rank holds at least `at_least` (or up to 2³¹ more, modulo 2³²).
    ///
    /// # Errors
    /// [`Error::Signal`] after `timeout`; the first cause of a failure, also of a rank that left without `destroy`;
    /// [`Error::Argument`] if there is no such slot.
    pub fn wait_signal(&self, slot: usize, at_least: u32, timeout: Duration) -> Result<()> {
        let rank = self.rank();
        self.check_peer("wait_signal", rank)?;
        let pad = self.pad(rank);
        let Some(word) = pad.word(slot) else { return Err(self.no_such_slot("wait_signal", slot)) };
        let policy = WaitPolicy { patience: Some(timeout), warn_after: None, ..self.policy };
        let budget = SpinBudget::new(&policy);
        let watch =
            Watch { abort: self.control.abort(), word, sleepers: self.sleepers(rank), budget: &budget };
        match wait(&policy, watch, || pad.has_reached(slot, at_least), || {}) {
            Ok(()) => Ok(()),
            Err(Stopped::TimedOut { waited }) => {
                let got = pad.value(slot).unwrap_or_default();
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

    /// The address of `peer`'s copy in this process, for code of one's own: as foreign memory that others write at any time.
    ///
    /// # Errors
    /// [`Error::Argument`] if `peer` is no rank.
    pub fn address(&self, peer: usize) -> Result<u64> {
        self.check_peer("address", peer)?;
        Ok(self.copies.start(peer) as u64)
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
    fn check(&self, call: &'static str, peer: usize, at: usize, count: usize) -> Result<usize> {
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

    fn no_such_slot(&self, call: &'static str, slot: usize) -> Error {
        let (expected, got) = (format!("below {SIGNAL_SLOTS}"), slot.to_string());
        Error::Argument { call, rank: self.rank(), what: "slot", expected, got }
    }

    fn bytes_of(&self, peer: usize) -> SharedBytes<'_> {
        let start = std::ptr::with_exposed_provenance_mut(self.copies.start(peer));
        let words = self.copies.bytes().div_ceil(8);
        // SAFETY: a copy begins on a page and has whole pages, and lives as long as `self`; every rank touches one-sided memory by
        // 64-bit atomics only.
        SharedBytes::new(unsafe { words64(start, words) })
    }

    fn pad(&self, peer: usize) -> SignalPad<'_> {
        let (start, field) = self.signals(|layout| layout.signals(peer));
        // SAFETY: as above.
        SignalPad::new(unsafe { words64(start, field.bytes / 8) }, SIGNAL_STRIDE / 8)
    }

    fn sleepers(&self, peer: usize) -> Sleepers<'_> {
        let (start, _) = self.signals(|layout| layout.sleepers(peer));
        // SAFETY: as above; the count is accessed as a 32-bit atomic only.
        Sleepers::new(unsafe { &words32(start, 1)[0] })
    }

    /// A field of the memory that holds the signals.
    fn signals(&self, field: impl FnOnce(&WindowLayout) -> Field) -> (*mut u8, Field) {
        let (memory, layout) = self.copies.signals();
        let field = field(layout);
        // SAFETY: all fields lie in the mapping, whose length was agreed.
        (unsafe { memory.as_ptr().add(field.offset) }, field)
    }
}

impl<T: Element> From<Symmetric<T>> for Closing {
    fn from(symmetric: Symmetric<T>) -> Self {
        Self::new(symmetric.control, symmetric.id, Some(Held::Host(symmetric.copies)))
    }
}
