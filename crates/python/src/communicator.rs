//! `Communicator`: how it is made, ended, and what it tells. Its operations are in `operations`.

use std::sync::Arc;
use std::sync::Once;
use std::time::Duration;

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType};
use unisono::{Builder, Error, Observer, Stream};

use crate::kept::{self, InFlight};
use crate::progress::Progress;
use crate::store::{Store, UniqueId};
use crate::window::AllKnown;
use crate::{errors, interrupt, options, torch_store};

/// One rank of a world: what it does together with the others.
///
/// Made by ``unisono.init()`` or ``Communicator.from_env()`` in a process that a launcher started (``unisono run``, ``torchrun``,
/// ``mpirun``, ``srun``), by ``from_store`` or ``from_unique_id`` where you tell rank and world size yourself, by
/// ``from_process_group`` beside torch, or by ``threads`` for ranks that are threads of this process. All ranks of a communicator make
/// the same calls in the same order, with the same dtype, number of elements, reduction and root; ranks that differ get a
/// ``MismatchError`` that names both calls.
///
/// Arrays are those of any framework: numpy and everything with the buffer protocol, torch, cupy, jax and everything with DLPack,
/// ``__cuda_array_interface__`` or ``__array_interface__``; contiguous, of bool, int8 to int64, uint8 to uint64, float16, bfloat16,
/// float32, float64, float8_e4m3fn, float8_e5m2, complex64 or complex128. Nothing is copied or imported. An argument that does not fit
/// raises ``ArgumentError`` (a ``ValueError``) on that rank alone: nothing was sent or written, and the communicator still works.
///
/// Operations on memory of the host block until they are complete, without the interpreter lock; Ctrl-C ends a wait with
/// ``KeyboardInterrupt``, and the communicator is then aborted on all ranks. Operations on a GPU are enqueued in ``stream`` (default:
/// the framework's current one) and return; arrays are kept alive until the stream has passed them. All operations share these
/// arguments: ``stream``, which may be a pair: the operation's, and one that it comes behind (None: the framework's current one);
/// ``async_op=True``, which returns a ``Work`` instead of waiting; ``timeout`` in seconds or as a timedelta,
/// the longest that this call waits for ranks that live (default: that of the communicator; after it the communicator has failed).
///
/// Several threads may hold a communicator; their calls go one after the other. ``abort`` and ``explain`` never wait for them. As a
/// context manager it is ended by ``destroy()``, or, if the block raised, dropped, which the other ranks notice.
///
/// >>> import numpy as np, unisono
/// >>> def main(rank):
/// ...     x = np.full(3, rank.rank + 1.0, dtype=np.float32)
/// ...     return rank.all_reduce(x).tolist()
/// >>> unisono.on_threads(2, main)
/// [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]
#[pyclass(frozen, module = "unisono")]
pub(crate) struct Communicator {
    /// `None` once it is closed. Taken without the interpreter, because who has it may wait.
    inner: Mutex<Option<Inner>>,
    observer: Observer,
    pub(crate) in_flight: InFlight,
    /// Windows and registrations that are open.
    pub(crate) known: AllKnown,
    pub(crate) progress: Arc<Progress>,
    #[pyo3(get)]
    /// This rank, from 0.
    pub(crate) rank: usize,
    #[pyo3(get)]
    /// The number of ranks.
    pub(crate) world_size: usize,
    #[pyo3(get)]
    /// This rank's number among the ranks of its host.
    local_rank: usize,
    #[pyo3(get)]
    /// How often this world was shrunk, beginning with what ``generation=`` said.
    generation: u32,
    #[pyo3(get)]
    /// The numbers of the GPUs that this rank works on, in this process.
    pub(crate) devices: Vec<u32>,
}

/// What is used by one thread at a time.
pub(crate) struct Inner {
    pub(crate) communicator: unisono::Communicator,
    /// Streams of frameworks that were used, by handle and device.
    streams: Vec<((u64, u32), Arc<Stream>)>,
}

/// Why something did not come about.
pub(crate) enum Failure {
    Library(Error),
    Python(PyErr),
    Closed,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Library(error)
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl Inner {
    /// The stream with this handle on this device, which waits for the streams `after` there.
    pub(crate) fn stream_after(
        &mut self,
        handle: u64,
        ordinal: u32,
        after: &[u64],
    ) -> Result<Arc<Stream>, Error> {
        let stream = self.stream(handle, ordinal)?;
        for other in after {
            let other = self.stream(*other, ordinal)?;
            if let (Some(stream), Some(other)) = (stream.as_cuda(), other.as_cuda()) {
                let rank = self.communicator.rank();
                kept::follow(stream, other).map_err(|error| Error::Cuda { rank, error })?;
            }
        }
        Ok(stream)
    }

    /// The stream with this handle on this device.
    pub(crate) fn stream(&mut self, handle: u64, ordinal: u32) -> Result<Arc<Stream>, Error> {
        if let Some((_, stream)) = self.streams.iter().find(|(key, _)| *key == (handle, ordinal)) {
            return Ok(stream.clone());
        }
        // SAFETY: whoever gave the handle keeps the stream while calls are in it, as the documentation of `stream=` asks.
        let stream =
            unsafe { Stream::cuda(std::ptr::with_exposed_provenance_mut(handle as usize), ordinal) }?;
        let stream = Arc::new(stream);
        self.streams.push(((handle, ordinal), stream.clone()));
        Ok(stream)
    }
}

impl Communicator {
    pub(crate) fn wrap(communicator: unisono::Communicator) -> Self {
        communicator.interrupt_by(interrupt::hook());
        Self {
            observer: communicator.observer(),
            in_flight: InFlight::default(),
            known: AllKnown::default(),
            progress: Arc::default(),
            rank: communicator.rank(),
            world_size: communicator.world_size(),
            local_rank: communicator.local_rank(),
            generation: communicator.generation(),
            devices: communicator.devices(),
            inner: Mutex::new(Some(Inner { communicator, streams: Vec::new() })),
        }
    }

    fn build(py: Python<'_>, builder: Builder, options: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        start_logging();
        Ok(Self::wrap(options::build(py, options::configure(builder, options)?)?))
    }

    /// The communicator, once no other thread uses it. Called without the interpreter. Signals are handled meanwhile.
    #[inline]
    pub(crate) fn lock(&self) -> Result<MappedMutexGuard<'_, Inner>, Failure> {
        let guard = self.lock_option()?;
        MutexGuard::try_map(guard, Option::as_mut).map_err(|_| Failure::Closed)
    }

    #[inline]
    fn lock_option(&self) -> Result<MutexGuard<'_, Option<Inner>>, Failure> {
        Ok(interrupt::lock(&self.inner)?)
    }

    /// Whether another thread uses the communicator, or else what `f` says of it.
    pub(crate) fn try_with<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> Option<Result<R, Failure>> {
        let mut guard = self.inner.try_lock()?;
        Some(guard.as_mut().map(f).ok_or(Failure::Closed))
    }

    /// The exception of a failure of `call`.
    #[cold]
    pub(crate) fn raised(&self, py: Python<'_>, failure: Failure, call: &'static str) -> PyErr {
        if let Some(raised) = interrupt::take() {
            return raised;
        }
        match failure {
            Failure::Library(error) => errors::raised(py, &error),
            Failure::Python(error) => error,
            Failure::Closed => errors::closed(py, "communicator", call, self.rank),
        }
    }

    /// Does something rare that may wait long in ways that signals do not end: on a thread of its own, and a handler that raises aborts
    /// this communicator.
    pub(crate) fn interruptibly<R: Send>(
        &self,
        py: Python<'_>,
        call: &'static str,
        work: impl FnOnce(&unisono::Communicator) -> Result<R, Error> + Send,
    ) -> PyResult<R> {
        let done = py.detach(|| {
            let mut inner = self.lock()?;
            // One operating thread is a type fact, so the exclusive reference goes.
            let communicator = &mut inner.communicator;
            std::thread::scope(|scope| {
                let worker = scope.spawn(move || work(communicator));
                let mut raised = None;
                while !worker.is_finished() {
                    std::thread::sleep(Duration::from_micros(200));
                    if let (None, Err(error)) = (&raised, interrupt::look()) {
                        self.observer.abort(&format!("a signal ended {call}"));
                        raised = Some(error);
                    }
                }
                let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                match raised {
                    Some(error) => Err(Failure::Python(error)),
                    None => Ok(result?),
                }
            })
        });
        done.map_err(|failure| self.raised(py, failure, call))
    }

    /// Ends the communicator with all other ranks.
    fn end(&self, py: Python<'_>) -> Result<(), Failure> {
        let ended = py.detach(|| self.take().and_then(|taken| Ok(taken.destroy()?)));
        self.let_go_of_all();
        ended
    }

    /// What was in flight has ended with the communicator.
    fn let_go_of_all(&self) {
        self.in_flight.let_go(&self.in_flight.started());
    }

    /// Takes the communicator out: it is closed from now on.
    fn take(&self) -> Result<unisono::Communicator, Failure> {
        let inner = self.lock_option()?.take();
        inner.map(|inner| inner.communicator).ok_or(Failure::Closed)
    }
}

/// Warnings of the library go to standard error, as those of the command do.
fn start_logging() {
    static STARTED: Once = Once::new();
    STARTED.call_once(unisono_cli::log_to_stderr);
}

#[pymethods]
impl Communicator {
    /// Joins the world that the launcher of this process describes. Every rank calls it.
    ///
    /// Options, all by name: ``timeout`` (seconds or timedelta, infinity for ever; default 600 s), ``init_timeout`` (30 s),
    /// ``liveness`` (3 s), ``warn_after`` (10 s), ``device`` or ``devices`` (numbers of GPUs in this process), ``order`` ("fixed" or
    /// "rank"), ``require`` ("none", "auth" or "nvlink"), ``algorithm``, ``tune_file``, ``recorder``, ``multiprocessors``, ``prepare``
    /// (pairs of dtype and reduction whose kernels are loaded now, so that calls can be captured in graphs), ``job``,
    /// ``generation``, ``secret`` (32 bytes). What is not given is what ``UNISONO_*`` variables say.
    ///
    /// Raises ``LaunchNothingError`` and its like if no launcher says enough; ``InitTimeoutError``, which names the ranks that did not
    /// come.
    ///
    /// >>> import os, tempfile, unisono
    /// >>> os.environ.update(RANK="0", WORLD_SIZE="1", UNISONO_STORE=f"file://{tempfile.mkdtemp()}/store")  # a launcher does that
    /// >>> with unisono.Communicator.from_env(timeout=60) as rank:
    /// ...     (rank.rank, rank.world_size)
    /// (0, 1)
    #[classmethod]
    #[pyo3(signature = (**options))]
    fn from_env(
        _class: &Bound<'_, PyType>,
        py: Python<'_>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let builder = Builder::from_env().map_err(|error| errors::raised(py, &error))?;
        Self::build(py, builder, options)
    }

    /// Meets the other ranks in ``store``: one of this package, or any object with the methods of ``torch.distributed.Store`` (set, get,
    /// add, wait, check, compare_set). Every rank calls it. Options are those of ``from_env``.
    ///
    /// Raises as ``from_env``; ``DuplicateRankError`` and ``DisagreementError`` naming both sides where ranks do not fit together.
    ///
    /// >>> import unisono
    /// >>> with unisono.Communicator.from_store(unisono.MemoryStore(), rank=0, world_size=1) as rank:
    /// ...     rank.barrier()
    #[classmethod]
    #[pyo3(signature = (store, rank, world_size, **options))]
    fn from_store(
        _class: &Bound<'_, PyType>,
        store: &Bound<'_, PyAny>,
        rank: usize,
        world_size: usize,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let builder = unisono::Communicator::builder();
        let builder = builder.store(Store::of(store)?).rank(rank).world_size(world_size);
        Self::build(store.py(), builder, options)
    }

    /// Meets the other ranks in the store that the id names, with its secret. Every rank calls it. Options are those of ``from_env``.
    ///
    /// >>> import unisono
    /// >>> server = unisono.StoreServer()
    /// >>> with unisono.Communicator.from_unique_id(server.unique_id, rank=0, world_size=1) as rank:
    /// ...     rank.world_size
    /// 1
    #[classmethod]
    #[pyo3(signature = (unique_id, rank, world_size, **options))]
    fn from_unique_id(
        _class: &Bound<'_, PyType>,
        py: Python<'_>,
        unique_id: &Bound<'_, UniqueId>,
        rank: usize,
        world_size: usize,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let builder = unisono::Communicator::builder();
        let builder = builder.unique_id(unique_id.get().0.clone()).rank(rank).world_size(world_size);
        Self::build(py, builder, options)
    }

    /// Joins the ranks of a process group of torch (default: the default group), in the store of that group. Every rank of the group
    /// calls it. Options are those of ``from_env``; ``device`` for work on a GPU.
    ///
    /// Raises ``ArgumentError`` if ``torch.distributed`` was not imported.
    ///
    /// >>> import unisono
    /// >>> unisono.Communicator.from_process_group()  # before init_process_group
    /// Traceback (most recent call last):
    /// unisono.errors.ArgumentError: from_process_group on rank 0: torch.distributed should be...
    #[classmethod]
    #[pyo3(signature = (group=None, **options))]
    fn from_process_group(
        _class: &Bound<'_, PyType>,
        py: Python<'_>,
        group: Option<Bound<'_, PyAny>>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let (store, rank, world_size) = torch_store::of_group(py, group)?;
        let builder = unisono::Communicator::builder().store(store).rank(rank).world_size(world_size);
        Self::build(py, builder, options)
    }

    /// A world whose ranks are threads of this process: a list of communicators, one for each thread.
    ///
    /// >>> import unisono
    /// >>> [rank.rank for rank in unisono.Communicator.threads(3)]
    /// [0, 1, 2]
    #[classmethod]
    fn threads(_class: &Bound<'_, PyType>, py: Python<'_>, world_size: usize) -> PyResult<Vec<Self>> {
        start_logging();
        let ranks = unisono::Communicator::threads(world_size).map_err(|error| errors::raised(py, &error))?;
        Ok(ranks.into_iter().map(Self::wrap).collect())
    }

    /// A world in this process with a rank on each of ``devices`` (numbers of GPUs), all driven by one thread: calls on GPUs are
    /// enqueued and return; those on memory of the host go into a ``group()``. The communicators, by rank.
    ///
    /// Raises ``CudaError`` without a driver or such a device.
    ///
    /// >>> import unisono
    /// >>> ranks = unisono.Communicator.local([0, 1])  # doctest: +SKIP
    #[classmethod]
    fn local(_class: &Bound<'_, PyType>, py: Python<'_>, devices: Vec<u32>) -> PyResult<Vec<Self>> {
        start_logging();
        let ranks = py.detach(|| unisono::Communicator::local(&devices));
        let ranks = ranks.map_err(|error| errors::raised(py, &error))?;
        Ok(ranks.into_iter().map(Self::wrap).collect())
    }

    /// The GPU that this rank works on, or None.
    #[getter]
    fn device(&self) -> Option<u32> {
        self.devices.first().copied()
    }

    /// Splits the ranks into groups: those with one ``color`` get a communicator of their own, ranked by ``key`` and then by their rank
    /// here; who has no color gets None. Every rank calls it. The new ones live on when this one is destroyed or fails.
    ///
    /// >>> import unisono
    /// >>> def main(rank):
    /// ...     half = rank.split(rank.rank % 2)
    /// ...     return half.rank, half.world_size
    /// >>> unisono.on_threads(4, main)
    /// [(0, 2), (0, 2), (1, 2), (1, 2)]
    #[pyo3(signature = (color=None, *, key=0))]
    fn split(&self, py: Python<'_>, color: Option<u32>, key: i32) -> PyResult<Option<Self>> {
        let child = self.interruptibly(py, "split", |communicator| communicator.split(color, key))?;
        Ok(child.map(Self::wrap))
    }

    /// Another communicator of the same ranks, with memory and an order of calls of its own. Every rank calls it.
    ///
    /// >>> import unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.duplicate().world_size)
    /// [2, 2]
    fn duplicate(&self, py: Python<'_>) -> PyResult<Self> {
        self.interruptibly(py, "duplicate", unisono::Communicator::duplicate).map(Self::wrap)
    }

    /// Goes on without the ranks that are lost, after a failure: a communicator of the next generation. Every rank that is left calls
    /// it. This one is closed then, and its memory answers ``GenerationError``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     if rank.rank == 1:
    /// ...         return None  # drops its communicator
    /// ...     try:
    /// ...         rank.barrier()
    /// ...     except unisono.UnisonoError:
    /// ...         rank = rank.shrink()
    /// ...     return rank.world_size, rank.generation
    /// >>> unisono.on_threads(3, main)
    /// [(2, 1), None, (2, 1)]
    fn shrink(&self, py: Python<'_>) -> PyResult<Self> {
        let taken = py.detach(|| self.take()).map_err(|failure| self.raised(py, failure, "shrink"))?;
        self.let_go_of_all();
        let next = interrupt::on_a_thread(py, move || taken.shrink())?;
        next.map(Self::wrap).map_err(|error| self.raised(py, error.into(), "shrink"))
    }

    /// Ends this communicator together with all other ranks: returns when every rank has called it, at the latest after 30 s (or the
    /// timeout, if that is shorter). It is closed then, whatever came of it.
    ///
    /// >>> import unisono
    /// >>> unisono.Communicator.threads(1)[0].destroy()
    fn destroy(&self, py: Python<'_>) -> PyResult<()> {
        self.end(py).map_err(|failure| self.raised(py, failure, "destroy"))
    }

    /// Fails the communicator on all ranks: whoever waits gets ``AbortedError`` with ``reason``. From any thread, at any time; waits
    /// for nobody.
    ///
    /// >>> import unisono
    /// >>> rank = unisono.Communicator.threads(1)[0]
    /// >>> rank.abort("enough")
    /// >>> rank.barrier()
    /// Traceback (most recent call last):
    /// unisono.errors.AbortedError: rank 0 aborted the communicator during an earlier call: enough
    #[pyo3(signature = (reason="abort() was called"))]
    fn abort(&self, reason: &str) {
        self.observer.abort(reason);
    }

    /// How this world is connected, how it chooses algorithms, and what the latest operation took and why, as text. From any thread;
    /// waits for nobody.
    ///
    /// >>> import unisono
    /// >>> "ranks [0, 1], connected by shared memory" in unisono.Communicator.threads(2)[0].explain()
    /// True
    fn explain(&self) -> String {
        self.observer.explain().to_string()
    }

    /// How many operations this rank has completed, which one it is in (or None), and the sentence of the first failure (or None). From
    /// any thread; waits for nobody.
    ///
    /// >>> import unisono
    /// >>> rank = unisono.Communicator.threads(1)[0]
    /// >>> rank.barrier()
    /// >>> rank.state()
    /// (1, None, None)
    fn state(&self) -> (u64, Option<String>, Option<String>) {
        let state = self.observer.state();
        (state.completed, state.current, state.failure.map(|failure| failure.to_string()))
    }

    /// Raises the first cause if this communicator has failed, on the host or in kernels that ran so far. Waits for nobody.
    ///
    /// >>> import unisono
    /// >>> unisono.Communicator.threads(1)[0].check()
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let checked = py.detach(|| self.lock().and_then(|inner| Ok(inner.communicator.check()?)));
        checked.map_err(|failure| self.raised(py, failure, "check"))
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        if kind.is_none() {
            return match self.end(py) {
                // It was ended or shrunk inside.
                Err(Failure::Closed) => Ok(()),
                ended => ended.map_err(|failure| self.raised(py, failure, "destroy")),
            };
        }
        // Who fails does not wait for the others; they are told.
        let taken = py.detach(|| self.take().ok());
        drop(taken);
        self.let_go_of_all();
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("<unisono.Communicator rank {} of {}>", self.rank, self.world_size)
    }
}
