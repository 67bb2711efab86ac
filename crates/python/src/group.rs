//! `group()`: calls within its block are collected, and posted together at its end.

use std::cell::RefCell;
use std::sync::Arc;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use unisono::{Error, Operations, Stream};

use crate::call::{Request, Way};
use crate::communicator::{Communicator, Failure};
use crate::kept::{self, Held, Spare};

thread_local! {
    /// The calls that this thread's open groups have collected, and how many groups are open.
    static OPEN: RefCell<(usize, Vec<Collected>)> = const { RefCell::new((0, Vec::new())) };
}

/// A call that waits for the end of its group.
struct Collected {
    communicator: Py<Communicator>,
    request: Request,
    /// Streams and devices, one for each buffer of an operation on several GPUs; none otherwise.
    each: Vec<(u64, u32)>,
    held: Vec<Held>,
}

/// Where a call of a group goes.
enum Queue {
    One(Arc<Stream>),
    Each(Vec<Stream>),
}

/// The block of ``unisono.group()``.
#[pyclass(frozen, module = "unisono")]
pub(crate) struct Group;

/// Posts the calls of a block together, on one communicator or on several that this thread drives, and returns from the block when
/// those on memory of the host are complete; those on GPUs are enqueued then. Within a group the order of messages does not matter.
/// Groups within a group are a part of it. If the block raises, nothing is posted.
///
/// Raises what the calls would: arguments are looked at in the call, and checked by the library at the end, before anything is sent.
///
/// >>> import numpy as np, unisono
/// >>> ranks = unisono.Communicator.threads(2)
/// >>> numbers, got = [np.array([10]), np.array([11])], np.zeros((2, 1), dtype=np.int64)
/// >>> with unisono.group():  # two ranks on one thread exchange numbers
/// ...     for me, rank in enumerate(ranks):
/// ...         _ = rank.send(numbers[me], 1 - me)
/// ...         _ = rank.recv(got[me], 1 - me)
/// >>> got.tolist()
/// [[11], [10]]
#[pyfunction]
pub(crate) fn group() -> Group {
    Group
}

/// The streams with these handles on these devices, in one slice: of a call on several GPUs, in a group or on its own.
pub(crate) fn all_streams(handles: &[(u64, u32)]) -> Result<Vec<Stream>, Error> {
    let of = |(handle, ordinal): &(u64, u32)| {
        let raw = std::ptr::with_exposed_provenance_mut(*handle as usize);
        // SAFETY: as for single streams: whoever gave the handle keeps the stream.
        unsafe { Stream::cuda(raw, *ordinal) }
    };
    handles.iter().map(of).collect()
}

/// Whether this thread is inside a group.
#[inline]
pub(crate) fn is_open() -> bool {
    OPEN.with_borrow(|(depth, _)| *depth > 0)
}

/// Collects a call; `each` has the streams of one on several GPUs.
pub(crate) fn add(
    communicator: &Bound<'_, Communicator>,
    request: Request,
    each: Vec<(u64, u32)>,
    held: Vec<Held>,
) {
    let communicator = communicator.clone().unbind();
    OPEN.with_borrow_mut(|(_, calls)| calls.push(Collected { communicator, request, each, held }));
}

#[pymethods]
impl Group {
    fn __enter__(this: Py<Self>) -> Py<Self> {
        OPEN.with_borrow_mut(|(depth, _)| *depth += 1);
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let left = OPEN.with_borrow_mut(|(depth, calls)| {
            *depth = depth.checked_sub(1)?;
            Some((*depth, if *depth == 0 { std::mem::take(calls) } else { Vec::new() }))
        });
        let Some((depth, calls)) = left else {
            return Err(PyRuntimeError::new_err("a group ends on the thread that began it"));
        };
        if depth > 0 || calls.is_empty() || !kind.is_none() {
            return Ok(());
        }
        post(py, calls)
    }
}

/// Until the work before `event` is done; not at all where there is nothing to wait for.
fn keep(event: Option<Arc<Spare>>, held: Vec<Held>) {
    if let Some(event) = event {
        kept::keep_until(event, held);
    }
}

fn post(py: Python<'_>, calls: Vec<Collected>) -> PyResult<()> {
    // In one order everywhere, so that two threads with the same communicators do not wait for each other.
    let mut communicators: Vec<&Communicator> = calls.iter().map(|call| call.communicator.get()).collect();
    communicators.sort_by_key(|communicator| std::ptr::from_ref(*communicator).addr());
    communicators.dedup_by(|one, other| std::ptr::eq(*one, *other));
    let mut at_fault = communicators.first().copied();
    let done = py.detach(|| {
        let mut locked = Vec::new();
        for communicator in &communicators {
            at_fault = Some(communicator);
            locked.push((*communicator, communicator.lock()?));
        }
        let mut queues = Vec::new();
        for call in &calls {
            let inner = locked
                .iter_mut()
                .find(|(communicator, _)| std::ptr::eq(*communicator, call.communicator.get()));
            let Some((_, inner)) = inner else { return Err(Failure::Closed) };
            queues.push(match call.each.is_empty() {
                true => Queue::One(call.request.stream(inner)?),
                false => Queue::Each(all_streams(&call.each)?),
            });
        }
        unisono::group(|group| {
            for (call, queue) in calls.iter().zip(&queues) {
                let found = locked.iter().find(|(one, _)| std::ptr::eq(*one, call.communicator.get()));
                let Some((_, inner)) = found else { continue };
                // SAFETY: the group holds what holds the memory until it is done, and for streams until these have passed.
                let submitted = unsafe { call.request.call() };
                match queue {
                    Queue::One(stream) => group.on(&inner.communicator, stream).submit(submitted)?,
                    Queue::Each(streams) => group.on_each(&inner.communicator, streams).submit(submitted)?,
                }
            }
            Ok(())
        })?;
        let events = |(call, queue): (&Collected, &Queue)| {
            let event = |stream: &Stream| call.communicator.get().event_behind(stream);
            match queue {
                Queue::One(stream) => Ok(vec![event(stream)?]),
                Queue::Each(streams) => streams.iter().map(event).collect(),
            }
        };
        Ok(calls.iter().zip(&queues).map(events).collect::<Result<Vec<Vec<_>>, Error>>()?)
    });
    let events = match (done, at_fault) {
        (Ok(events), _) => events,
        (Err(failure), Some(communicator)) => {
            let is_on_host =
                calls.iter().all(|call| matches!(call.request.way, Way::Host) && call.each.is_empty());
            let raised = communicator.raised(py, failure, "group");
            if !is_on_host {
                // A part of it may be at work, and nothing tells when that ends.
                std::mem::forget(calls);
            }
            return Err(raised);
        }
        (Err(_), None) => return Ok(()),
    };
    for (mut call, mut events) in calls.into_iter().zip(events) {
        // Of a call on several GPUs each stream keeps the buffer that it works on.
        let last = events.pop();
        let each = call.held.split_off(events.len());
        for (event, held) in events.into_iter().zip(call.held) {
            keep(event, vec![held]);
        }
        keep(last.flatten(), each);
    }
    Ok(())
}
