//! What operations that are not complete keep alive: their arrays, with what holds the memory of these in place.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::prelude::*;
use unisono::binding::Started;
use unisono::cuda::{Event, Result, Stream};

use crate::array::Guard;

/// An array, or another object, and what its memory was lent by.
#[expect(dead_code, reason = "held for their life")]
pub(crate) struct Held(pub(crate) Py<PyAny>, pub(crate) Guard);

/// The arrays of operations in flight on the host.
#[derive(Default)]
pub(crate) struct InFlight(Mutex<Vec<(Started, Vec<Held>)>>);

impl InFlight {
    /// Keeps `held` until `started` is over.
    pub(crate) fn keep(&self, started: Started, held: Vec<Held>) {
        self.0.lock().push((started, held));
    }

    /// The operations for which something is kept.
    pub(crate) fn started(&self) -> Vec<Started> {
        self.0.lock().iter().map(|(started, _)| *started).collect()
    }

    /// Lets go of what was kept for `over`. Called with the interpreter, and without locks: what goes may run code of Python.
    pub(crate) fn let_go(&self, over: &[Started]) {
        if over.is_empty() {
            return;
        }
        let gone: Vec<_> = {
            let mut kept = self.0.lock();
            kept.extract_if(.., |(started, _)| over.contains(started)).collect()
        };
        drop(gone);
    }
}

/// The arrays of calls in streams of GPUs, in the order in which they were enqueued. One list for all communicators: what one leaves
/// behind goes when another looks.
static ENQUEUED: Mutex<VecDeque<Enqueued>> = Mutex::new(VecDeque::new());

/// Those of one call, with the event behind it.
struct Enqueued {
    event: Arc<Spare>,
    #[expect(dead_code, reason = "held for its life")]
    held: Vec<Held>,
}

/// Events that nobody uses, with their devices.
static EVENTS: Mutex<Vec<(u32, Event)>> = Mutex::new(Vec::new());

/// The most that one look lets go of, so that no call pays for many.
const AT_ONCE: usize = 4;

/// An event of that list, which goes back there. None that a capture recorded is among them: those belong to their graph.
pub(crate) struct Spare {
    ordinal: u32,
    event: Event,
}

impl Spare {
    /// Behind what `stream` holds now, which is not captured.
    fn behind(stream: &Stream) -> Result<Self> {
        let ordinal = stream.device().ordinal();
        let unused = {
            let mut events = EVENTS.lock();
            let at = events.iter().position(|(device, _)| *device == ordinal);
            at.map(|at| events.swap_remove(at).1)
        };
        let event = unused.map_or_else(|| Event::new(stream.device(), false), Ok)?;
        event.record(stream)?;
        Ok(Self { ordinal, event })
    }
}

impl Deref for Spare {
    type Target = Event;

    fn deref(&self) -> &Event {
        &self.event
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        EVENTS.lock().push((self.ordinal, self.event.clone()));
    }
}

/// Keeps `held` until the stream of `event` has passed it.
pub(crate) fn keep_until(event: Arc<Spare>, held: Vec<Held>) {
    let mut gone = Vec::new();
    {
        let mut enqueued = ENQUEUED.lock();
        Stream::beside_captures(|| {
            while gone.len() < AT_ONCE
                && let Some(first) = enqueued.front()
                // What failed is not at work any more.
                && first.event.is_done().unwrap_or(true)
            {
                gone.extend(enqueued.pop_front());
            }
        });
        enqueued.push_back(Enqueued { event, held });
    }
    drop(gone);
}

/// An event behind what `stream` holds, unless that is captured in a graph, which has no end to wait for.
///
/// # Errors
/// What the driver refuses.
pub(crate) fn event_behind(stream: &Stream) -> Result<Option<Arc<Spare>>> {
    if stream.is_capturing()? {
        return Ok(None);
    }
    Ok(Some(Arc::new(Spare::behind(stream)?)))
}

/// The point behind what `stream` holds, which a graph captures: other streams of the capture wait for it.
///
/// # Errors
/// What the driver refuses.
pub(crate) fn captured_behind(stream: &Stream) -> Result<Event> {
    let event = Event::new(stream.device(), false)?;
    event.record(stream)?;
    Ok(event)
}

/// Work that comes later in `stream` waits for what `other` holds now. If a graph captures that, it captures this as well.
///
/// # Errors
/// What the driver refuses.
pub(crate) fn follow(stream: &Stream, other: &Stream) -> Result<()> {
    if other.is_capturing()? {
        return stream.wait(&captured_behind(other)?);
    }
    // The wait is for this record, whatever the event records next.
    stream.wait(&*Spare::behind(other)?)
}
