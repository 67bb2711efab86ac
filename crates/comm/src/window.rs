//! Windows: memory that every rank of a host has, and all map. Collectives on them read peers' memory in place.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use unisono_core::Element;
use unisono_core::call::Kind;

use crate::buffer::{Buf, BufMut, Place, RawBuffer};
use crate::communicator::Communicator;
use crate::control::Control;
use crate::copies::Copies;
use crate::error::{Error, Result};
use crate::symmetric::{Parts, Symmetric};
pub use making::Closing;
pub(crate) use making::Limits;

mod making;

/// Where the memory of a window lies. All ranks ask for the same.
///
/// ```
/// # use unisono::{Communicator, Memory, Operations, ReduceOp, Stream};
/// # let ranks = Communicator::threads(2)?;
/// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
/// // On a communicator with a GPU, a stream of that; the rest is the same.
/// let stream = Stream::host();
/// let mut window = rank.window::<f32>(1000, Memory::Pinned)?;
/// window.lend()?.fill(1.0);
/// rank.on(&stream).all_reduce(&mut window, ReduceOp::Sum)?;
/// assert_eq!(window.lend()?[999], 2.0);
/// window.close(&rank)?;
/// # rank.destroy() })).collect();
/// # for rank in ranks { rank.join().unwrap()?; }
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Memory {
    /// Host memory, anonymous and shared.
    #[default]
    Host,
    /// Memory of each rank's GPU, which all GPUs of the communicator reach: collectives in place, and, once it is one-sided
    /// ([`Window::into_symmetric`]), kernels of one's own.
    Device,
    /// Host memory that the CPUs of all ranks and all GPUs of the host reach, whether or not these reach each other's memory:
    /// collectives of both work on it in place, and [`Window::lend`] gives it as a slice. What the host does with it waits for the
    /// calls on it that our GPU was given before. Each rank's copy lies on the NUMA node of its GPU, where the driver offers that
    /// (`UNISONO_PINNED`). Without GPUs it is host memory, so the same code runs on both.
    Pinned,
}

/// What a window lies in.
#[derive(Clone, Debug)]
pub(crate) enum Held {
    /// All copies, as the CPU reaches them.
    Host(Copies),
    /// Our copy, on our device.
    #[cfg(feature = "cuda")]
    Device(Arc<unisono_cuda::SharedPages>),
}

/// This rank's copy of a window of `T`. Peers touch it only between our entry to and exit from a collective on it, so
/// it can be lent as a slice in between. Made by [`Communicator::window`].
///
/// Dropping it without [`Window::close`] keeps its memory until the communicator is gone.
#[derive(Debug)]
pub struct Window<T: Element> {
    control: Arc<Control>,
    held: Held,
    id: u64,
    count: usize,
    elem: PhantomData<T>,
}

impl<T: Element> Window<T> {
    pub(crate) fn new(control: Arc<Control>, held: Held, id: u64, count: usize) -> Self {
        Self { control, held, id, count, elem: PhantomData }
    }

    /// The first element of this rank's copy.
    fn base(&self) -> u64 {
        match &self.held {
            Held::Host(copies) => copies.start(self.control.member().0) as u64,
            #[cfg(feature = "cuda")]
            Held::Device(pages) => pages.address(),
        }
    }

    /// Elements of this rank's copy.
    pub const fn len(&self) -> usize {
        self.count
    }

    /// True if there are none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Its id, equal on all ranks.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// This rank's copy, until the next collective on it. Of a pinned window, waits until our GPU is done with the calls of this
    /// communicator on such windows that were put into streams; if some are in CUDA graphs, until it is done with everything.
    /// So whoever drives several ranks makes a call on all of them before it lends a window of one.
    ///
    /// # Errors
    /// [`Error::Poisoned`] once the communicator failed: a peer may have been writing. [`Error::Generation`] once it was shrunk.
    /// [`Error::Forked`] in a forked child. [`Error::Place`] if it lies on a GPU. [`Error::Cuda`] if our GPU failed.
    pub fn lend(&mut self) -> Result<&mut [T]> {
        self.control.check_process()?;
        if let Some(error) = self.control.outdated(self.id) {
            return Err(error);
        }
        self.check_cause()?;
        #[cfg_attr(
            not(feature = "cuda"),
            expect(clippy::infallible_destructuring_match, reason = "GPUs have more")
        )]
        let copies = match &self.held {
            Held::Host(copies) => copies,
            #[cfg(feature = "cuda")]
            Held::Device(_) => {
                return Err(Error::Place {
                    call: "lend",
                    rank: self.control.member().0,
                    expected: "windows of host memory".to_owned(),
                    got: "memory of a GPU".to_owned(),
                });
            }
        };
        if copies.are_pinned() {
            let settled = copies.settle();
            self.check_cause()?;
            settled?;
        }
        let base: *mut T = std::ptr::with_exposed_provenance_mut(self.base() as usize);
        // SAFETY: the base is page-aligned, `count` elements long, lives as long as `held`, and every bit pattern is a
        // valid `T`. Peers read and write it only while we are inside a collective, which needs this borrow to be over; what
        // was put into streams was just waited for.
        Ok(unsafe { std::slice::from_raw_parts_mut(base, self.count) })
    }

    /// Peers may still be writing once the communicator has failed.
    fn check_cause(&self) -> Result<()> {
        let Some(cause) = self.control.cause() else { return Ok(()) };
        let cause = cause.into_error("a collective", self.control.member()).to_string();
        Err(Error::Poisoned { id: self.id, cause })
    }

    /// The elements of `range` as an input.
    ///
    /// # Panics
    /// If the range does not lie inside, as for slices.
    pub fn range(&self, range: Range<usize>) -> Buf<'_, T> {
        Buf::new(self.raw(range))
    }

    /// The elements of `range` as an output, or input and output.
    ///
    /// # Panics
    /// If the range does not lie inside, as for slices.
    pub fn range_mut(&mut self, range: Range<usize>) -> BufMut<'_, T> {
        BufMut::new(self.raw(range))
    }

    /// The address of this rank's copy: of host memory (as the CPU calls it, if it is pinned), or of its GPU's.
    pub fn address(&self) -> u64 {
        self.base()
    }

    /// What keeps the address valid in this process, also after [`Window::close`]: for views of host memory that live longer. `None` if the
    /// memory lies on a GPU.
    pub fn mapping(&self) -> Option<Arc<dyn std::any::Any + Send + Sync>> {
        match &self.held {
            Held::Host(copies) => Some(Arc::new(copies.clone())),
            #[cfg(feature = "cuda")]
            Held::Device(_) => None,
        }
    }

    /// Whether `communicator` made this window, for the call of this `kind`.
    pub(crate) fn check_owner(&self, kind: Kind, communicator: &Communicator) -> Result<()> {
        check_owner(kind, self.id, &self.control, communicator)
    }

    /// Ends the window on all ranks and frees its memory. Collective.
    ///
    /// # Errors
    /// [`Error::Argument`] if `communicator` did not make this window; [`Error::Generation`] if an earlier generation of it did;
    /// those of a failed communicator. This rank's hold on the memory ends in any case.
    pub fn close(self, communicator: &Communicator) -> Result<()> {
        communicator.close_window(self.into())
    }

    /// Makes this window one-sided memory: from now on every rank reads and writes all copies at any time, and no collective
    /// works on it. What the copies hold stays. Collective: when it returns, every rank has given its window up.
    ///
    /// # Errors
    /// As [`Window::close`]. If it lies on GPUs, all ranks have their one-sided memory or none has: [`Error::Cuda`] on a rank
    /// whose GPU refused something, [`Error::Device`] on the others. The window has ended on all ranks then, its memory is freed,
    /// and the communicator works on.
    pub fn into_symmetric(self, communicator: &Communicator) -> Result<Symmetric<T>> {
        check_owner(Kind::Symmetric, self.id, &self.control, communicator)?;
        let policy = communicator.engine().policy();
        let copies = match self.held {
            Held::Host(copies) => {
                communicator.end_window(Kind::Symmetric, self.id, &self.control)?;
                Parts::Host(copies)
            }
            #[cfg(feature = "cuda")]
            Held::Device(own) => {
                // If it comes to nothing, nobody keeps the memory.
                drop(own);
                Parts::Device(communicator.make_one_sided(self.id, (self.count, size_of::<T>()))?)
            }
        };
        Ok(Symmetric::new(self.control, copies, (self.id, self.count), policy))
    }

    fn raw(&self, range: Range<usize>) -> RawBuffer {
        assert!(
            range.start <= range.end && range.end <= self.count,
            "range {range:?} of a window of {} elements",
            self.count
        );
        RawBuffer {
            ptr: self.base() + (range.start * size_of::<T>()) as u64,
            count: range.len(),
            dtype: T::DTYPE,
            place: Place::Window { id: self.id },
        }
    }
}

/// Refuses window `id` of `owner` unless that is `communicator`, in its generation.
pub(crate) fn check_owner(
    kind: Kind,
    id: u64,
    owner: &Arc<Control>,
    communicator: &Communicator,
) -> Result<()> {
    match owner.outdated(id) {
        Some(error) => Err(error),
        None if Arc::ptr_eq(owner, &communicator.control) => Ok(()),
        None => Err(Error::Argument {
            call: kind.name(),
            rank: communicator.rank(),
            what: "window",
            expected: "a window of this communicator".to_owned(),
            got: format!("window {id} of another one"),
        }),
    }
}

impl<T: Element> From<Window<T>> for Closing {
    fn from(window: Window<T>) -> Self {
        Self::new(window.control, window.id, Some(window.held))
    }
}

impl<'w, T: Element> From<&'w Window<T>> for Buf<'w, T> {
    fn from(window: &'w Window<T>) -> Self {
        window.range(0..window.count)
    }
}

impl<'w, T: Element> From<&'w mut Window<T>> for BufMut<'w, T> {
    fn from(window: &'w mut Window<T>) -> Self {
        let all = 0..window.count;
        window.range_mut(all)
    }
}
