//! What operations that are not complete keep alive: their arrays, with what holds the memory of these in place.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::prelude::*;
use unisono::binding::Started;
use unisono::cuda::{Event, Stream};

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

/// Those of one call: on device `ordinal`, with the event behind it.
struct Enqueued {
    ordinal: u32,
    event: Arc<Event>,
    held: Vec<Held>,
}

/// Events that nobody uses, with their devices.
static EVENTS: Mutex<Vec<(u32, Event)>> = Mutex::new(Vec::new());

/// The most that one look lets go of, so that no call pays for many.
const AT_ONCE: usize = 4;

/// Keeps `held` until the stream of `event` has passed it.
pub(crate) fn keep_until(ordinal: u32, event: Arc<Event>, held: Vec<Held>) {
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
        enqueued.push_back(Enqueued { ordinal, event, held });
    }
    for Enqueued { ordinal, event, held } in gone {
        if let Some(event) = Arc::into_inner(event) {
            EVENTS.lock().push((ordinal, event));
        }
        drop(held);
    }
}

/// An event behind what `stream` holds, unless that is captured in a graph, which has no end to wait for.
///
/// # Errors
/// What the driver refuses.
pub(crate) fn event_behind(stream: &Stream) -> unisono::cuda::Result<Option<Arc<Event>>> {
    if stream.is_capturing()? {
        return Ok(None);
    }
    let ordinal = stream.device().ordinal();
    let spare = {
        let mut events = EVENTS.lock();
        let at = events.iter().position(|(device, _)| *device == ordinal);
        at.map(|at| events.swap_remove(at).1)
    };
    let event = spare.map_or_else(|| Event::new(stream.device(), false), Ok)?;
    event.record(stream)?;
    Ok(Some(Arc::new(event)))
}
