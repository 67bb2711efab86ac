//! What a group is asked for beside operations: windows, registrations, communicators made of others, and their ends. All of
//! these are collective and wait for the other ranks, so a thread that drives several of them cannot carry them out one after
//! the other. When the group ends, each communicator gets a thread for as long as its requests last.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use unisono_core::Element;
use unisono_core::call::Kind;

use super::{Group, Grouped};
#[cfg(feature = "cuda")]
use crate::buffer::RawBuffer;
use crate::communicator::Communicator;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::registration::Registration;
use crate::symmetric::Symmetric;
use crate::window::{Closing, Memory, Window};

/// What a request of a [`Group`] comes to, once the group has ended.
#[must_use = "it holds what was asked for"]
#[derive(Debug)]
pub struct Promised<T> {
    made: Made<T>,
    call: &'static str,
    rank: usize,
}

impl<T> Promised<T> {
    /// The value.
    ///
    /// # Errors
    /// Why it could not be made. [`Error::Argument`] while the group goes on, or if it came to nothing before its end.
    pub fn take(self) -> Result<T> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).take();
        made.unwrap_or_else(|| {
            Err(Error::Argument {
                call: self.call,
                rank: self.rank,
                what: "time of asking for its result",
                expected: "after the end of the group".to_owned(),
                got: "a group that has not carried it out".to_owned(),
            })
        })
    }
}

type Made<T> = Arc<Mutex<Option<Result<T>>>>;

/// A collective on the communicator that it was asked of.
type Request = Box<dyn FnOnce(&Communicator) -> Result<()> + Send>;

/// What one communicator has to do when the group ends.
pub(super) enum Task<'b> {
    Requests(Lent<'b>, Vec<Request>),
    Destroy(Box<Communicator>),
}

/// A communicator that a thread of the group operates, while the thread of the group waits.
pub(super) struct Lent<'b>(&'b Communicator);

// SAFETY: a communicator may move between threads, and only its shared use is refused. Nobody else uses this one: whoever has a
// reference to it is the thread that the group runs on, because a `Communicator` is not `Sync`. That one stays in `carry_out` until
// the thread that this is given to has ended, and touches no other communicator meanwhile than that of its own task; each
// communicator is in one task only.
unsafe impl Send for Lent<'_> {}

impl fmt::Debug for Task<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requests(lent, requests) => {
                f.debug_tuple("Requests").field(&lent.0.rank()).field(&requests.len()).finish()
            }
            Self::Destroy(communicator) => f.debug_tuple("Destroy").field(&communicator.rank()).finish(),
        }
    }
}

impl Task<'_> {
    /// The communicator, if it is only lent.
    pub(super) const fn lent(&self) -> Option<&Communicator> {
        match self {
            Self::Requests(lent, _) => Some(lent.0),
            Self::Destroy(_) => None,
        }
    }

    fn rank(&self) -> usize {
        match self {
            Self::Requests(lent, _) => lent.0.rank(),
            Self::Destroy(communicator) => communicator.rank(),
        }
    }

    /// Everything in its order, whatever fails: other ranks do so, too. The first failure.
    fn carry_out(self) -> Result<()> {
        match self {
            Self::Requests(lent, requests) => {
                let done: Vec<Result<()>> = requests.into_iter().map(|request| request(lent.0)).collect();
                done.into_iter().collect()
            }
            Self::Destroy(communicator) => communicator.destroy(),
        }
    }
}

impl<'b> Group<'b> {
    /// Ends `communicator` together with all of its ranks, as [`Communicator::destroy`] does, when the group ends. If the group
    /// fails before it carries anything out, the communicator is dropped.
    pub fn destroy(&self, communicator: Communicator) {
        self.tasks.borrow_mut().push(Task::Destroy(Box::new(communicator)));
    }

    fn request(&self, communicator: &'b Communicator, request: Request) {
        let mut tasks = self.tasks.borrow_mut();
        let known = tasks.iter_mut().find_map(|task| match task {
            Task::Requests(lent, requests) if std::ptr::eq(lent.0, communicator) => Some(requests),
            _ => None,
        });
        match known {
            Some(requests) => requests.push(request),
            None => tasks.push(Task::Requests(Lent(communicator), vec![request])),
        }
    }
}

impl Grouped<'_, '_> {
    /// As [`Communicator::window`]: made when the group ends, after its operations and what was asked of this communicator
    /// before.
    ///
    /// ```
    /// # use unisono::{Communicator, Memory, Operations, ReduceOp, Stream, group};
    /// // One thread is two ranks.
    /// let (ranks, stream) = (Communicator::threads(2)?, Stream::host());
    /// let promised = group(|group| {
    ///     let window = |rank| group.on(rank, &stream).window::<f32>(1000, Memory::Host);
    ///     ranks.iter().map(window).collect::<Result<Vec<_>, _>>()
    /// })?;
    /// let mut windows = promised.into_iter().map(|promised| promised.take()).collect::<Result<Vec<_>, _>>()?;
    /// windows[1].lend()?.fill(1.5);
    /// group(|group| {
    ///     let mut ranks = ranks.iter().zip(&mut windows);
    ///     ranks.try_for_each(|(rank, window)| group.on(rank, &stream).all_reduce(window, ReduceOp::Sum))
    /// })?;
    /// assert_eq!(windows[0].lend()?[999], 1.5);
    /// group(|group| {
    ///     ranks.iter().zip(windows).try_for_each(|(rank, window)| group.on(rank, &stream).close(window))
    /// })?;
    /// group(|group| Ok(ranks.into_iter().for_each(|rank| group.destroy(rank))))?;
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// The first cause of a failure of the communicator. Those of [`Communicator::window`] are told when the group ends.
    pub fn window<T: Element>(&self, count: usize, memory: Memory) -> Result<Promised<Window<T>>> {
        self.promise(Kind::Window, move |communicator| communicator.window(count, memory))
    }

    /// As [`Communicator::split`], when the group ends.
    ///
    /// # Errors
    /// As [`Grouped::window`].
    pub fn split(&self, color: Option<u32>, key: i32) -> Result<Promised<Option<Communicator>>> {
        self.promise(Kind::Split, move |communicator| communicator.split(color, key))
    }

    /// As [`Communicator::duplicate`], when the group ends.
    ///
    /// # Errors
    /// As [`Grouped::window`].
    pub fn duplicate(&self) -> Result<Promised<Communicator>> {
        self.promise(Kind::Duplicate, Communicator::duplicate)
    }

    /// As [`Window::into_symmetric`], when the group ends.
    ///
    /// # Errors
    /// As [`Grouped::close`].
    pub fn into_symmetric<T: Element>(&self, window: Window<T>) -> Result<Promised<Symmetric<T>>> {
        window.check_owner(Kind::Symmetric, self.communicator)?;
        self.promise(Kind::Symmetric, move |communicator| window.into_symmetric(communicator))
    }

    /// As [`Communicator::register`], when the group ends.
    ///
    /// # Safety
    /// `buffer` is allocated, and stays so until the registration is closed on every rank, or the group has ended without one.
    ///
    /// # Errors
    /// What [`Communicator::register`] tells at once, on this rank alone, is told here; else as [`Grouped::window`].
    #[cfg(feature = "cuda")]
    pub unsafe fn register(&self, buffer: RawBuffer) -> Result<Promised<Registration>> {
        self.communicator.registers_at(&buffer)?;
        // SAFETY: the caller promises it of this memory for longer than the group lasts.
        self.promise(Kind::Register, move |communicator| unsafe { communicator.register(buffer) })
    }

    /// As [`Window::close`], [`Symmetric::close`] and the `close` of registrations, when the group ends.
    ///
    /// # Errors
    /// [`Error::Argument`] if the communicator did not make this memory; else as [`Grouped::window`].
    pub fn close(&self, memory: impl Into<Closing>) -> Result<()> {
        let memory = memory.into();
        memory.check_owner(self.communicator)?;
        self.promise(Kind::CloseWindow, move |communicator| communicator.close_window(memory)).map(drop)
    }

    fn promise<T: Send + 'static>(
        &self,
        kind: Kind,
        make: impl FnOnce(&Communicator) -> Result<T> + Send + 'static,
    ) -> Result<Promised<T>> {
        self.communicator.engine().check()?;
        let made: Made<T> = Arc::default();
        let to = made.clone();
        let request = move |communicator: &Communicator| {
            let value = make(communicator);
            let result = value.as_ref().map(drop).map_err(Error::clone);
            *to.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
            result
        };
        self.group.request(self.communicator, Box::new(request));
        Ok(Promised { made, call: kind.name(), rank: self.communicator.rank() })
    }
}

/// Carries out all tasks at once and waits for them: the last one here, each other one on a thread of its own. The first
/// failure, in the order in which the communicators came.
pub(super) fn carry_out(mut tasks: Vec<Task<'_>>) -> Result<()> {
    let Some(last) = tasks.pop() else { return Ok(()) };
    // Nobody begins before it is known that all can: one that is missing would let the others wait.
    let can_begin = RwLock::new(Ok(()));
    std::thread::scope(|scope| {
        let mut gate = can_begin.write().unwrap_or_else(PoisonError::into_inner);
        let mut threads = Vec::with_capacity(tasks.len());
        for task in tasks {
            let (rank, can_begin) = (task.rank(), &can_begin);
            let begin = move || {
                can_begin.read().unwrap_or_else(PoisonError::into_inner).clone()?;
                task.carry_out()
            };
            match std::thread::Builder::new().name("unisono-group".to_owned()).spawn_scoped(scope, begin) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    let (call, what) = ("group", "thread for its requests");
                    let (expected, got) = ("one that the system gives".to_owned(), error.to_string());
                    *gate = Err(Error::Argument { call, rank, what, expected, got });
                    break;
                }
            }
        }
        let all_can = gate.clone();
        drop(gate);
        let last = all_can.and_then(|()| last.carry_out());
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
        };
        let results: Vec<Result<()>> = threads.into_iter().map(join).chain([last]).collect();
        results.into_iter().collect()
    })
}
