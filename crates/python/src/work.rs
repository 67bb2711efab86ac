//! `Work`: an operation that was started and is waited for later.

use std::sync::Arc;
use std::time::Duration;

use pyo3::intern;
use pyo3::prelude::*;
use unisono::Stream;
use unisono::binding::Started;
use unisono::cuda::{self, Event};

use crate::array::{StreamOf, imported};
use crate::call::with_patience;
use crate::communicator::{Communicator, Failure};
use crate::kept::Spare;
use crate::{options, stream};

/// An operation that was started with ``async_op=True``. It keeps its arrays alive; dropping it is harmless, and the operation goes on.
///
/// On memory of the host it makes progress inside ``wait``, ``is_completed`` and any other call of its communicator; in between only with
/// ``add_done_callback``. On a GPU it is already in its stream.
///
/// >>> import numpy as np, unisono
/// >>> def main(rank):
/// ...     work = rank.all_reduce(np.ones(2), async_op=True)
/// ...     return work.wait().tolist(), work.is_completed()
/// >>> unisono.on_threads(2, main)
/// [([2.0, 2.0], True), ([2.0, 2.0], True)]
#[pyclass(frozen, module = "unisono")]
pub(crate) struct Work {
    communicator: Py<Communicator>,
    state: State,
    patience: Option<Option<Duration>>,
    #[pyo3(get)]
    /// The array that holds the result once the operation is complete.
    result: Py<PyAny>,
}

enum State {
    Host(Started),
    /// On this device.
    Device(u32, Point),
}

/// What lies behind a call in a stream.
pub(crate) enum Point {
    Event(Arc<Spare>),
    /// A graph captured the call, which is never complete then; with a point that other streams of the capture wait for, where the call's stream is
    /// one that its user does not wait for otherwise.
    Captured(Option<(Arc<Stream>, Event)>),
}

impl Point {
    /// Work that comes later in `stream` waits for it.
    fn wait_in(&self, stream: &cuda::Stream) -> cuda::Result<()> {
        match self {
            Self::Event(event) => stream.wait(event),
            Self::Captured(Some((of, event)))
                if of.as_cuda().map_or(Ok(false), cuda::Stream::is_capturing)? =>
            {
                stream.wait(event)
            }
            // Whoever launches the graph waits for that.
            Self::Captured(_) => Ok(()),
        }
    }
}

impl Work {
    pub(crate) fn on_host<'py>(
        communicator: &Bound<'py, Communicator>,
        started: Started,
        patience: Option<Option<Duration>>,
        result: &Bound<'py, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        Self::make(communicator, State::Host(started), patience, result)
    }

    pub(crate) fn on_device<'py>(
        communicator: &Bound<'py, Communicator>,
        (ordinal, point): (u32, Point),
        result: &Bound<'py, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        Self::make(communicator, State::Device(ordinal, point), None, result)
    }

    fn make<'py>(
        communicator: &Bound<'py, Communicator>,
        state: State,
        patience: Option<Option<Duration>>,
        result: &Bound<'py, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let (py, result) = (communicator.py(), result.clone().unbind());
        let work = Self { communicator: communicator.clone().unbind(), state, patience, result };
        Ok(Bound::new(py, work)?.into_any().unbind())
    }

    /// Takes the operations of the communicator as far as they go, if nobody else uses it; whether any went on.
    pub(crate) fn advance(&self) -> bool {
        let advanced = self.communicator.get().try_with(|inner| inner.communicator.advance());
        matches!(advanced, Some(Ok(Ok(true))))
    }

    /// Whether the operation is complete, or has failed, as far as can be told without waiting.
    pub(crate) fn is_over(&self) -> bool {
        match &self.state {
            State::Host(started) => {
                let is_over = self.communicator.get().try_with(|inner| inner.communicator.is_over(*started));
                // A communicator that is closed takes nothing along.
                is_over.is_some_and(|is_over| is_over.unwrap_or(true))
            }
            State::Device(..) => self.test().unwrap_or(true),
        }
    }

    /// Whether the operation is complete. Called without the interpreter.
    fn test(&self) -> Result<bool, Failure> {
        let communicator = self.communicator.get();
        match &self.state {
            State::Host(started) => {
                let tested = communicator.try_with(|inner| Ok(inner.communicator.test(*started)?));
                tested.map_or(Ok(false), |tested| tested.and_then(|tested| tested))
            }
            State::Device(_, Point::Captured(_)) => Ok(false),
            State::Device(_, Point::Event(event)) => {
                let rank = communicator.rank;
                let is_done = cuda::Stream::beside_captures(|| event.is_done());
                let is_done = is_done.map_err(|error| unisono::Error::Cuda { rank, error })?;
                if is_done && let Some(checked) = communicator.try_with(|inner| inner.communicator.check()) {
                    checked?.map_err(Failure::Library)?;
                }
                Ok(is_done)
            }
        }
    }
}

#[pymethods]
impl Work {
    /// Waits until the operation is complete, for at most ``timeout`` (default: that of the call), and returns its array. On a GPU it
    /// makes the current stream of torch (or ``stream``) wait for the call, and returns at once, as torch's works do.
    ///
    /// Raises the first cause of a failure. After the timeout the communicator has failed on all ranks (``TimeoutError``).
    #[pyo3(signature = (timeout=None, *, stream=None))]
    fn wait(
        &self,
        py: Python<'_>,
        timeout: Option<&Bound<'_, PyAny>>,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let communicator = self.communicator.get();
        let rank = communicator.rank;
        let patience =
            timeout.map(|time| options::patience(time, "wait", rank)).transpose()?.or(self.patience);
        let over = match &self.state {
            State::Host(started) => py.detach(|| {
                let inner = communicator.lock()?;
                with_patience(&inner.communicator, patience, |one| one.complete(*started))
                    .map(|()| Some(*started))
            }),
            State::Device(ordinal, point) => {
                let site = communicator.site("wait", "stream");
                let handle = match stream {
                    Some(given) => stream::handle(given, site)?,
                    None => {
                        let is_torch = imported(py, intern!(py, "torch"))?.is_some();
                        let of = if is_torch { StreamOf::Torch } else { StreamOf::Unknown };
                        stream::current(py, of, *ordinal)?
                    }
                };
                py.detach(|| {
                    let mut inner = communicator.lock()?;
                    let stream = inner.stream(handle, *ordinal)?;
                    if let Some(stream) = stream.as_cuda() {
                        point.wait_in(stream).map_err(|error| unisono::Error::Cuda { rank, error })?;
                    }
                    inner.communicator.check()?;
                    Ok(None)
                })
            }
        };
        let over = over.map_err(|failure| communicator.raised(py, failure, "wait"))?;
        communicator.in_flight.let_go(over.as_slice());
        Ok(self.result.clone_ref(py))
    }

    /// Has ``callback(work)`` called by another thread once the operation is complete or has failed, which ``wait`` then tells at once. From
    /// now on that thread takes the operation along while this one does something else. With None it does only that.
    ///
    /// What the callback raises goes to ``sys.unraisablehook``.
    ///
    /// Raises ``ArgumentError`` for a work of a call that a graph captured, which is never complete, and for a callback that cannot be called.
    ///
    /// >>> import threading, numpy as np, unisono
    /// >>> def main(rank):
    /// ...     done = threading.Event()
    /// ...     rank.all_reduce(np.ones(2), async_op=True).add_done_callback(lambda work: done.set())
    /// ...     is_done = done.wait(30)
    /// ...     rank.barrier()
    /// ...     return is_done
    /// >>> unisono.on_threads(2, main)
    /// [True, True]
    fn add_done_callback(this: &Bound<'_, Self>, callback: Option<Py<PyAny>>) -> PyResult<()> {
        let communicator = this.get().communicator.get();
        if matches!(this.get().state, State::Device(_, Point::Captured(_))) {
            let site = communicator.site("add_done_callback", "the work");
            return Err(site.refuse(this.py(), "of a call that runs", "one of a call that a graph captured"));
        }
        if let Some(callback) = callback
            .as_ref()
            .map(|callback| callback.bind(this.py()))
            .filter(|callback| !callback.is_callable())
        {
            let site = communicator.site("add_done_callback", "callback");
            let got = callback.get_type().name()?.to_string();
            return Err(site.refuse(this.py(), "something that can be called, or None", got));
        }
        communicator.progress.add(this.clone().unbind(), callback);
        Ok(())
    }

    /// Whether the operation is complete. Waits for nobody; False while another thread is inside a call of the communicator, which takes
    /// this operation along.
    ///
    /// Raises the first cause of a failure.
    fn is_completed(&self, py: Python<'_>) -> PyResult<bool> {
        let communicator = self.communicator.get();
        let done = py.detach(|| self.test());
        let is_done = done.map_err(|failure| communicator.raised(py, failure, "is_completed"))?;
        if let (true, State::Host(started)) = (is_done, &self.state) {
            communicator.in_flight.let_go(&[*started]);
        }
        Ok(is_done)
    }

    fn __repr__(&self) -> String {
        let rank = self.communicator.get().rank;
        format!("<unisono.Work of rank {rank}>")
    }
}
