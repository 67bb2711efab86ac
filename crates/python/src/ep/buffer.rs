//! `Buffer`: how it is made, made available and ended, who is left out of it, and the layout of a dispatch.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use unisono::ep::Settings;
use unisono::{DType, Error, Stream};

use super::inputs::Inputs;
use super::outputs::Outputs;
use crate::array::StreamOf;
use crate::call::Way;
use crate::communicator::{Communicator, Failure};
use crate::symmetric::dtype_of;
use crate::view::View;
use crate::{errors, interrupt, options, stream};

/// Moves tokens of a mixture of experts to the ranks that have their experts, and brings results back.
///
/// ``hidden`` is the number of elements of a token, a multiple of 8; ``experts`` that of the experts of all ranks, which have equal blocks of
/// them. Options, all by name: ``placement`` (the rank of each expert, for other blocks), ``capacity`` (the most tokens of a rank in a
/// low-latency call; default 128), ``top_k`` (the most experts of a token, at most 32; default 32), ``dtype`` (the widest that travels:
/// "bfloat16", the default, "float16" or "float32"), ``low_latency`` (whether there is memory for low-latency calls), ``masking`` (whether a
/// dead or silent rank is left out instead of failing the communicator), ``deadline`` (how long a living rank may be silent in a call; 10 s,
/// ten times as long in the first call). On GPUs also ``pool_bytes`` (memory for outputs, which peers write; default: for a dispatch of 4,096
/// tokens of every rank) and ``multiprocessors`` (the most that a call takes; default 12).
///
/// It can be used once all ranks have called ``exchange()``, as ``with`` does. All ranks make the same calls in the same order, with the same
/// dtype, top-k and options; numbers of tokens are each rank's own. Arrays are those of any framework, as for a ``Communicator``; where a
/// framework has no bfloat16 or float8_e4m3fn, tokens may be given as uint16 and uint8. Outputs are arrays of the framework of ``x`` (of
/// numpy where that is not known), they own their memory, and outputs of different calls never alias. Sums are made in float32, in the order
/// of ranks: equal input gives equal bits.
///
/// Arrays of a GPU are used in the order of ``stream`` (default: the current one of their framework). An argument that does not fit raises
/// ``ArgumentError`` before anything is sent, and the buffer still works; other errors end it. A rank that dies, or is silent for longer
/// than the deadline, fails the communicator, and the error names it.
///
/// >>> import numpy as np, unisono
/// >>> def main(rank):
/// ...     with unisono.ep.Buffer(rank, hidden=8, experts=4, dtype="float32") as buffer:
/// ...         x = np.full((1, 8), 1.5, np.float32)
/// ...         sent = buffer.dispatch(x, np.array([[1, 3]]))  # a token for one expert of each rank
/// ...         return buffer.combine(sent.x * 2, sent.handle).x.tolist()
/// >>> unisono.on_threads(2, main) == [[[6.0] * 8]] * 2
/// True
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct Buffer {
    pub(super) communicator: Py<Communicator>,
    shared: Arc<Shared>,
    pub(super) hidden: usize,
}

/// What views of the buffer's own memory keep, too.
struct Shared(Mutex<State>);

impl Shared {
    fn new(buffer: unisono::ep::Buffer) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { buffer, is_closed: false, lent_as: None })))
    }
}

pub(super) struct State {
    pub(super) buffer: unisono::ep::Buffer,
    is_closed: bool,
    /// The type in which the memory for results was lent: it stays where it is.
    lent_as: Option<DType>,
}

/// Where the tokens of a rank go. Made by ``Buffer.layout``.
///
/// >>> import numpy as np, unisono
/// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=2) as buffer:
/// ...     layout = buffer.layout(np.array([[0, 1], [1, -1], [-1, -1]]))
/// >>> layout.tokens_per_rank.tolist(), layout.tokens_per_expert.tolist(), layout.is_token_in_rank.tolist()
/// ([2], [1, 2], [[True], [True], [False]])
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct Layout {
    pub(super) layout: unisono::ep::Layout,
    outputs: Outputs,
}

#[pymethods]
impl Layout {
    /// int32 ``[ranks]``: tokens to each rank; one that several experts of a rank take counts once.
    #[getter]
    fn tokens_per_rank(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.layout.tokens_per_rank())
    }

    /// int32 ``[experts]``: selections of each expert.
    #[getter]
    fn tokens_per_expert(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.layout.tokens_per_expert())
    }

    /// bool ``[tokens, ranks]``: which token goes to which rank.
    #[getter]
    fn is_token_in_rank(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.layout.is_token_in_rank())
    }
}

/// The settings that arguments of Python say.
fn settings(hidden: usize, experts: usize, options: Option<&Bound<'_, PyDict>>) -> PyResult<Settings> {
    let mut settings = Settings::new(hidden, experts);
    for (name, value) in options.into_iter().flatten() {
        let (name, call): (String, _) = (name.extract()?, "ep.Buffer");
        match name.as_str() {
            "placement" => settings.placement = value.extract()?,
            "capacity" => settings.capacity = value.extract()?,
            "top_k" => settings.top_k = value.extract()?,
            "dtype" => settings.dtype = dtype_of(&value, call, 0)?,
            "low_latency" => settings.low_latency = value.extract()?,
            "pool_bytes" => settings.pool_bytes = value.extract()?,
            "multiprocessors" => settings.multiprocessors = value.extract()?,
            "masking" => settings.masking = value.extract()?,
            "deadline" => {
                let finite =
                    || errors::argument(value.py(), call, 0, "deadline", "a time that ends", "infinity");
                settings.deadline = options::patience(&value, call, 0)?.ok_or_else(finite)?;
            }
            _ => return Err(PyTypeError::new_err(format!("there is no option `{name}` of an ep.Buffer"))),
        }
    }
    Ok(settings)
}

impl Buffer {
    pub(super) fn communicator(&self) -> &Communicator {
        self.communicator.get()
    }

    /// The buffer, once no other thread uses it. Called without the interpreter. Signals are handled meanwhile.
    pub(super) fn lock(&self) -> Result<MutexGuard<'_, State>, Failure> {
        let state = interrupt::lock(&self.shared.0)?;
        if state.is_closed { Err(Failure::Closed) } else { Ok(state) }
    }

    /// The exception of a failure of `call`.
    pub(super) fn raised(&self, py: Python<'_>, failure: Failure, call: &'static str) -> PyErr {
        match failure {
            Failure::Closed => errors::closed(py, "buffer", call, self.communicator().rank),
            failure => self.communicator().raised(py, failure, call),
        }
    }

    /// Does something that waits for nobody but threads of this process.
    pub(super) fn with<R: Send>(
        &self,
        py: Python<'_>,
        call: &'static str,
        f: impl FnOnce(&mut State) -> Result<R, Error> + Send,
    ) -> PyResult<R> {
        let done = py.detach(|| self.lock().and_then(|mut state| Ok(f(&mut state)?)));
        done.map_err(|failure| self.raised(py, failure, call))
    }
}

#[pymethods]
impl Buffer {
    #[new]
    #[pyo3(signature = (communicator, hidden, experts, **options))]
    fn new(
        communicator: &Bound<'_, Communicator>,
        hidden: usize,
        experts: usize,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let (py, rank) = (communicator.py(), communicator.get());
        let settings = settings(hidden, experts, options)?;
        let made = py.detach(|| {
            let inner = rank.lock()?;
            Ok(unisono::ep::Buffer::new(&inner.communicator, settings)?)
        });
        let buffer = made.map_err(|failure| rank.raised(py, failure, "ep.Buffer"))?;
        Ok(Self { communicator: communicator.clone().unbind(), shared: Shared::new(buffer), hidden })
    }

    /// Bytes of shared memory that each of ``world_size`` ranks needs for a buffer of these settings.
    ///
    /// >>> import unisono
    /// >>> unisono.ep.Buffer.bytes(8, hidden=7168, experts=256) > 128 * 7168 * 2
    /// True
    #[staticmethod]
    #[pyo3(signature = (world_size, hidden, experts, **options))]
    fn bytes(
        py: Python<'_>,
        world_size: usize,
        hidden: usize,
        experts: usize,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<usize> {
        let settings = settings(hidden, experts, options)?;
        settings.bytes(world_size).map_err(|error| errors::raised(py, &error))
    }

    /// Bytes of memory that each of ``world_size`` ranks needs on its GPU for a buffer of these settings.
    ///
    /// >>> import unisono
    /// >>> unisono.ep.Buffer.device_bytes(8, hidden=7168, experts=256) > 8 * 4096 * 7168 * 2
    /// True
    #[staticmethod]
    #[pyo3(signature = (world_size, hidden, experts, **options))]
    fn device_bytes(
        py: Python<'_>,
        world_size: usize,
        hidden: usize,
        experts: usize,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<usize> {
        let settings = settings(hidden, experts, options)?;
        settings.device_bytes(world_size).map_err(|error| errors::raised(py, &error))
    }

    /// Makes the buffer available: compares settings and shares memory. Collective: every rank calls it, once.
    ///
    /// Raises ``BufferSettingsError`` on all ranks, naming one whose settings differ; ``BufferStateError`` if it was called before.
    ///
    /// >>> import unisono
    /// >>> rank = unisono.Communicator.threads(1)[0]
    /// >>> buffer = unisono.ep.Buffer(rank, 64, experts=8)
    /// >>> buffer.exchange()
    /// >>> buffer.is_available
    /// True
    fn exchange(&self, py: Python<'_>) -> PyResult<()> {
        let call = "exchange";
        self.with(py, call, |_| Ok(()))?;
        self.communicator()
            .interruptibly(py, call, |communicator| self.shared.0.lock().buffer.exchange(communicator))
    }

    /// Ends the buffer on all ranks and frees its memory. Collective. Outputs stay; of the memory of ``combine_buffer`` that of the host does.
    ///
    /// >>> import unisono
    /// >>> rank = unisono.Communicator.threads(1)[0]
    /// >>> buffer = unisono.ep.Buffer(rank, 64, experts=8)
    /// >>> buffer.close()
    /// >>> buffer.masked
    /// Traceback (most recent call last):
    /// unisono.errors.ClosedError: masked on rank 0: the buffer is closed...
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let call = "close";
        self.with(py, call, |state| {
            state.is_closed = true;
            Ok(())
        })?;
        self.communicator()
            .interruptibly(py, call, |communicator| self.shared.0.lock().buffer.end(communicator))
    }

    /// A buffer of the same settings, exchanged, in which nobody is left out: for ranks that live, but were silent for too long or left out by
    /// ``mask_rank``. Collective over all ranks, those included that are left out. This buffer stays as it is, also if that fails, as it does for a
    /// rank that died; ``close`` it then. Handles belong to the buffer that made them. Memory for both is needed meanwhile.
    ///
    /// Raises ``ArgumentError`` without ``masking``, ``BufferStateError`` before the exchange, and errors of the communicator: ``PeerDiedError``
    /// names a rank that died, ``TimeoutError`` one that lives and does not call, which fails the communicator and this buffer.
    ///
    /// >>> import unisono
    /// >>> def main(rank):
    /// ...     with unisono.ep.Buffer(rank, 64, experts=2, masking=True) as buffer:
    /// ...         if rank.rank == 0:
    /// ...             buffer.mask_rank(1)
    /// ...         rank.barrier()
    /// ...         with buffer.renew() as renewed:
    /// ...             return buffer.masked, renewed.masked
    /// >>> unisono.on_threads(2, main)
    /// [([1], []), ([1], [])]
    fn renew(&self, py: Python<'_>) -> PyResult<Self> {
        let call = "renew";
        self.with(py, call, |_| Ok(()))?;
        let renewed = self
            .communicator()
            .interruptibly(py, call, |communicator| self.shared.0.lock().buffer.renew(communicator))?;
        Ok(Self {
            communicator: self.communicator.clone_ref(py),
            shared: Shared::new(renewed),
            hidden: self.hidden,
        })
    }

    /// Raises the first cause if this buffer has failed, on the host or in kernels that ran so far. On a GPU it also tells, once, of selections
    /// that are no expert, and of more rows than ``worst_tokens``, as ``ArgumentError``; the buffer works on after these. Waits for nobody.
    ///
    /// >>> import unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 64, experts=8) as buffer:
    /// ...     buffer.check()
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, "check", |state| state.buffer.check())
    }

    /// How calls of this buffer went, as text.
    ///
    /// >>> import unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 64, experts=8) as buffer:
    /// ...     buffer.explain()
    /// 'through shared memory of the host, ...'
    fn explain(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, "explain", |state| Ok(state.buffer.explain()))
    }

    /// Whether it was exchanged, has not failed and is not closed.
    #[getter]
    fn is_available(&self, py: Python<'_>) -> bool {
        py.detach(|| self.lock().is_ok_and(|state| state.buffer.is_available()))
    }

    /// Experts of this rank, by their numbers in the world, in the order of their local numbers.
    #[getter]
    fn local_experts(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        self.with(py, "local_experts", |state| Ok(state.buffer.local_experts()))
    }

    /// Ranks that are left out (maybe this one), ascending; after a call that all survivors made they all say the same. Empty without ``masking``.
    #[getter]
    fn masked(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        self.with(py, "masked", |state| Ok(state.buffer.masked()))
    }

    /// Leaves ``rank`` out, on all ranks, from the next round that it has not sent: for who knows of a failure otherwise. One rank has to
    /// call it; a call that any of them begins when it has returned is without the rank. The rank itself gets ``GivenUpError``. It cannot be undone in this buffer; ``renew`` takes everybody in again.
    ///
    /// >>> import unisono
    /// >>> rank = unisono.Communicator.threads(2)[0]
    /// >>> unisono.ep.Buffer(rank, 64, experts=8).mask_rank(1)
    /// Traceback (most recent call last):
    /// unisono.errors.ArgumentError: mask_rank on rank 0: settings should be masking, got none. Nothing was written.
    fn mask_rank(&self, py: Python<'_>, rank: usize) -> PyResult<()> {
        self.with(py, "mask_rank", |state| state.buffer.mask_rank(rank))
    }

    /// Where tokens go: ``topk_idx`` is int64 ``[tokens, top-k]``, each an expert, or −1, which selects nothing. Local: nobody is told.
    ///
    /// >>> import numpy as np, unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=2) as buffer:
    /// ...     buffer.layout(np.array([[0], [1], [1]])).tokens_per_expert.tolist()
    /// [1, 2]
    #[pyo3(signature = (topk_idx, *, stream=None))]
    fn layout<'py>(
        &self,
        topk_idx: &Bound<'py, PyAny>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Layout> {
        let mut inputs = Inputs::new(self, "layout", topk_idx.py(), stream)?;
        let (indices, shape) = inputs.take_of(DType::I64, "topk_idx", topk_idx, &[None, None])?;
        let layout = inputs.run(|buffer, lender, stream| {
            let indices = lender.buf::<i64>(indices);
            match stream {
                None => buffer.layout(indices, shape[1]),
                Some(stream) => buffer.layout_on(indices, shape[1], stream),
            }
        })?;
        Ok(Layout { layout, outputs: Outputs::of(self, topk_idx)? })
    }

    /// The layout that says this: ``is_token_in_rank`` is bool ``[tokens, ranks]``, ``tokens_per_expert`` int32 ``[experts]`` the selections
    /// of each expert. Local, and on the host: on a GPU it raises ``DeviceError``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=2) as buffer:
    /// ...     layout = buffer.layout_of_ranks(np.array([[True], [False]]), np.array([1, 1], np.int32))
    /// >>> layout.tokens_per_rank.tolist()
    /// [1]
    #[pyo3(signature = (is_token_in_rank, tokens_per_expert, *, stream=None))]
    fn layout_of_ranks<'py>(
        &self,
        is_token_in_rank: &Bound<'py, PyAny>,
        tokens_per_expert: &Bound<'py, PyAny>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Layout> {
        let mut inputs = Inputs::new(self, "layout", is_token_in_rank.py(), stream)?;
        let ranks = Some(self.communicator().world_size);
        let (table, _) = inputs.take_of(DType::Bool, "is_token_in_rank", is_token_in_rank, &[None, ranks])?;
        let (counts, _) = inputs.take_of(DType::I32, "tokens_per_expert", tokens_per_expert, &[None])?;
        let layout = inputs.run(|buffer, lender, _| {
            buffer.layout_of_ranks(lender.buf::<unisono::Bool8>(table), lender.buf::<i32>(counts))
        })?;
        Ok(Layout { layout, outputs: Outputs::of(self, is_token_in_rank)? })
    }

    /// Memory of this buffer for the results of a low-latency combine, which takes them from there if it is given None: a ``View`` of
    /// ``[L, M, hidden]``, zeroed when it is first asked for (on a GPU anything), and as it was left later. Every call for one buffer has the same ``dtype``.
    ///
    /// >>> import unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=2, low_latency=True, capacity=4) as buffer:
    /// ...     buffer.combine_buffer("bfloat16")
    /// <unisono.View [2, 4, 8] bfloat16 in host memory>
    #[pyo3(signature = (dtype=None, *, stream=None))]
    fn combine_buffer(
        &self,
        py: Python<'_>,
        dtype: Option<&Bound<'_, PyAny>>,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<View> {
        let (call, communicator) = ("combine_buffer", self.communicator());
        let rank = communicator.rank;
        let asked = dtype.map(|dtype| dtype_of(dtype, call, rank)).transpose()?;
        let given =
            stream.map(|stream| stream::handle(stream, communicator.site(call, "stream"))).transpose()?;
        let on_device = communicator.devices.first().map(|ordinal| (*ordinal, StreamOf::Torch));
        let way = communicator.way(py, call, on_device, given)?;
        let stream = match way {
            Way::Host => Ok(Arc::new(Stream::host())),
            Way::Stream(handle, ordinal) => {
                py.detach(|| communicator.lock().and_then(|mut inner| Ok(inner.stream(handle, ordinal)?)))
            }
        };
        let stream = stream.map_err(|failure| self.raised(py, failure, call))?;
        let (memory, dimensions) = self.with(py, call, |state| {
            let dtype = asked.unwrap_or(state.lent_as.unwrap_or(DType::BF16));
            if let Some(lent_as) = state.lent_as.filter(|lent_as| *lent_as != dtype) {
                let (expected, got) = (format!("{lent_as}, as before"), dtype.to_string());
                return Err(Error::Argument { call, rank, what: "dtype", expected, got });
            }
            let tensor = state.buffer.combine_buffer_on(dtype, &stream)?;
            let lent = (tensor.raw(), tensor.shape().to_vec());
            state.lent_as = Some(dtype);
            Ok(lent)
        })?;
        Ok(View { memory, dimensions, mapping: Some(self.shared.clone()) })
    }

    fn __enter__(this: PyRef<'_, Self>) -> PyResult<PyRef<'_, Self>> {
        let py = this.py();
        if !this.is_available(py) {
            this.exchange(py)?;
        }
        Ok(this)
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        // Who fails does not wait for the others.
        if !kind.is_none() || py.detach(|| self.lock().is_err()) {
            return Ok(());
        }
        self.close(py)
    }
}
