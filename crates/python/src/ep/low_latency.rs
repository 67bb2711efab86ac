//! The calls of the low-latency mode, whole and in halves, and what they give.

#![expect(clippy::too_many_arguments, reason = "they are arguments of Python, by name")]

use parking_lot::Mutex;
use pyo3::prelude::*;
use unisono::DType;
use unisono::ep::{self, ScaleKind};

use super::buffer::Buffer;
use super::inputs::Inputs;
use super::outputs::Outputs;
use crate::errors;

/// What a low-latency dispatch brought. L is the number of experts of this rank, M = ranks · capacity. Made by
/// ``Buffer.low_latency_dispatch``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct LowLatencyDispatched {
    /// ``[L, M, hidden]``: of each expert first the rows that came, by source rank and token; behind them zeros, on GPUs anything.
    /// float8_e4m3fn if they were cast.
    #[pyo3(get)]
    x: Py<PyAny>,
    /// The scales if they were cast, else None: float32 ``[L, blocks of 128, M]``, or with "ue8m0" int32 ``[L, blocks / 4, M]``.
    #[pyo3(get)]
    scales: Option<Py<PyAny>>,
    /// int32 ``[L]``: rows that came for each expert of this rank.
    #[pyo3(get)]
    counts: Py<PyAny>,
    /// int64 ``[ranks]``: how long each rank was waited for, in nanoseconds.
    #[pyo3(get)]
    waited: Py<PyAny>,
    /// For ``low_latency_combine``.
    #[pyo3(get)]
    handle: Py<LowLatencyHandle>,
}

/// Where the rows of a low-latency dispatch came from. Made by ``Buffer.low_latency_dispatch``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct LowLatencyHandle {
    handle: ep::LowLatencyHandle,
    outputs: Outputs,
}

/// What came of the tokens of a rank. Made by ``Buffer.low_latency_combine``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct LowLatencyCombined {
    /// ``[tokens, hidden]``, of the type that was combined.
    #[pyo3(get)]
    x: Py<PyAny>,
    /// int64 ``[ranks]``: how long each rank was waited for, in nanoseconds.
    #[pyo3(get)]
    waited: Py<PyAny>,
}

/// A low-latency dispatch that was sent and not yet received. Made by ``Buffer.low_latency_dispatch_send``, whose example ends in ``sent.receive()``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct SentDispatch {
    buffer: Py<Buffer>,
    outputs: Outputs,
    sent: Mutex<Option<ep::SentDispatch>>,
}

/// A low-latency combine that was sent and not yet received. Made by ``Buffer.low_latency_combine_send``, whose example ends in ``sent.receive()``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct SentCombine {
    buffer: Py<Buffer>,
    outputs: Outputs,
    sent: Mutex<Option<ep::SentCombine>>,
}

#[pymethods]
impl LowLatencyHandle {
    /// int32 ``[L, M]``: the index of each row's token at its source; only those of rows that came have a meaning.
    #[getter]
    fn source_tokens(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.handle.source_tokens())
    }

    /// int64 ``[L, ranks]``: the rows of each source within the block of an expert, as first << 32 | number.
    #[getter]
    fn layout_range(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.handle.layout_range())
    }
}

#[pymethods]
impl SentDispatch {
    /// Waits for what the others sent, and returns a ``LowLatencyDispatched``. Calls are received once, in the order in which they were sent.
    ///
    /// Raises ``ArgumentError`` if an earlier one was not received, or this one was; else as ``low_latency_dispatch``.
    fn receive(&self, py: Python<'_>) -> PyResult<LowLatencyDispatched> {
        let (buffer, call, outputs) = (self.buffer.get(), "receive_dispatch", &self.outputs);
        let sent = taken(py, buffer, &self.sent, call)?;
        let received = buffer.with(py, call, |state| state.buffer.receive_dispatch(sent))?;
        Ok(LowLatencyDispatched {
            x: outputs.array(py, received.x)?,
            scales: outputs.array_of(py, received.scales)?,
            counts: outputs.array(py, received.counts)?,
            waited: outputs.array(py, received.waited)?,
            handle: Py::new(py, LowLatencyHandle { handle: received.handle, outputs: outputs.later(py) })?,
        })
    }
}

#[pymethods]
impl SentCombine {
    /// Waits for the results of the others, adds them, and returns a ``LowLatencyCombined``. Calls are received once, in the order in which
    /// they were sent.
    ///
    /// Raises ``ArgumentError`` if an earlier one was not received, or this one was; else as ``low_latency_dispatch``.
    fn receive(&self, py: Python<'_>) -> PyResult<LowLatencyCombined> {
        let (buffer, call, outputs) = (self.buffer.get(), "receive_combine", &self.outputs);
        let sent = taken(py, buffer, &self.sent, call)?;
        let received = buffer.with(py, call, |state| state.buffer.receive_combine(sent))?;
        Ok(LowLatencyCombined {
            x: outputs.array(py, received.x)?,
            waited: outputs.array(py, received.waited)?,
        })
    }
}

/// What was sent, if nobody has received it.
fn taken<T>(py: Python<'_>, buffer: &Buffer, sent: &Mutex<Option<T>>, call: &'static str) -> PyResult<T> {
    let rank = buffer.communicator().rank;
    let again = || errors::argument(py, call, rank, "call", "one that was not received", "one that was");
    sent.lock().take().ok_or_else(again)
}

/// How rows are cast, by name.
fn cast_of(name: &Bound<'_, PyAny>, rank: usize) -> PyResult<ScaleKind> {
    let text = name.str()?.to_string();
    match text.as_str() {
        "float32" => Ok(ScaleKind::F32),
        "power_of_two" => Ok(ScaleKind::PowerOfTwo),
        "ue8m0" => Ok(ScaleKind::Ue8m0),
        _ => {
            let expected = "\"float32\", \"power_of_two\" or \"ue8m0\"";
            Err(errors::argument(name.py(), "low_latency_dispatch", rank, "cast", expected, text))
        }
    }
}

#[pymethods]
impl Buffer {
    /// Sends tokens to their experts, and returns a ``LowLatencyDispatched`` when those for this rank's experts are there. Every rank calls
    /// it. Needs ``low_latency=True``.
    ///
    /// ``x`` is ``[tokens, hidden]`` of bfloat16, float16 or float32, at most the buffer's ``capacity`` of tokens; ``topk_idx`` int64
    /// ``[tokens, top-k]``, each an expert (once for a token), or −1, which selects nothing. ``cast``: None, or the kind of scales with which
    /// rows are cast to float8_e4m3fn on their way, one for each 128 elements: "float32", "power_of_two", or "ue8m0" (exponents alone, four in
    /// an int32; ``hidden`` is a multiple of 512).
    ///
    /// Raises ``ArgumentError`` before anything is sent; ``MismatchError``, ``PeerDiedError``, ``TimeoutError`` naming the rank.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     with unisono.ep.Buffer(rank, 8, experts=2, dtype="float32", low_latency=True, capacity=4) as buffer:
    /// ...         topk_idx = np.array([[0], [1]])
    /// ...         sent = buffer.low_latency_dispatch(np.ones((2, 8), np.float32), topk_idx)
    /// ...         weights = np.full((2, 1), 0.5, np.float32)
    /// ...         got = buffer.low_latency_combine(sent.x * 4, topk_idx, weights, sent.handle)
    /// ...         return sent.x.shape, sent.counts.tolist(), got.x[:, 0].tolist()
    /// >>> unisono.on_threads(2, main)
    /// [((1, 8, 8), [2], [2.0, 2.0]), ((1, 8, 8), [2], [2.0, 2.0])]
    #[pyo3(signature = (x, topk_idx, *, cast=None, stream=None))]
    fn low_latency_dispatch<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        topk_idx: &Bound<'py, PyAny>,
        cast: Option<&Bound<'py, PyAny>>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<LowLatencyDispatched> {
        Self::low_latency_dispatch_send(this, x, topk_idx, cast, stream)?.receive(this.py())
    }

    /// The first half of ``low_latency_dispatch``: sends, and waits for nobody but those that have not yet received what was sent two calls
    /// ago. ``receive()`` of the ``SentDispatch`` is the second; between them anything else can be done. At most two calls are sent and not
    /// received at once.
    ///
    /// >>> import numpy as np, unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=2, dtype="float32", low_latency=True) as buffer:
    /// ...     sent = buffer.low_latency_dispatch_send(np.ones((1, 8), np.float32), np.array([[1]]))
    /// ...     sent.receive().counts.tolist()
    /// [0, 1]
    #[pyo3(signature = (x, topk_idx, *, cast=None, stream=None))]
    fn low_latency_dispatch_send<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        topk_idx: &Bound<'py, PyAny>,
        cast: Option<&Bound<'py, PyAny>>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<SentDispatch> {
        let (me, outputs) = (this.get(), Outputs::of(this.get(), x)?);
        let cast = cast.map(|cast| cast_of(cast, me.communicator().rank)).transpose()?;
        let mut inputs = Inputs::new(me, "low_latency_dispatch", this.py(), stream)?;
        let (rows, shape) = inputs.rows("x", x, &[None, Some(me.hidden)])?;
        let (indices, shape) = inputs.take_of(DType::I64, "topk_idx", topk_idx, &[Some(shape[0]), None])?;
        let sent = inputs.run(|buffer, lender, stream| {
            let indices = lender.buf::<i64>(indices);
            let mut dispatch = ep::LowLatencyDispatch::new(lender.input(rows), indices, shape[1]);
            if let Some(cast) = cast {
                dispatch = dispatch.cast(cast);
            }
            if let Some(stream) = stream {
                dispatch = dispatch.on(stream);
            }
            buffer.low_latency_dispatch_send(&dispatch)
        })?;
        Ok(SentDispatch { buffer: this.clone().unbind(), outputs, sent: Mutex::new(Some(sent)) })
    }

    /// Brings results back to the sources of their tokens, as a ``LowLatencyCombined``: the sum of weight · result over the selections of each.
    /// Every rank calls it, with a ``handle`` of the same dispatch.
    ///
    /// ``x`` is ``[L, M, hidden]`` of bfloat16, float16 or float32, the results in the places of the rows that came; None takes them from
    /// ``combine_buffer``. ``topk_idx`` is what was dispatched, ``topk_weights`` float32 of the same shape. With ``quantised`` rows travel as
    /// float8_e4m3fn, half the bytes of bfloat16 with four bits of precision. Per rank, weighted rows are added in float32 and rounded to the
    /// type; these sums are added in float32, in the order of ranks, and rounded once more. A token without experts is 0.
    ///
    /// Raises as ``low_latency_dispatch``; ``MismatchError`` if a rank gives other indices than it dispatched.
    ///
    /// >>> import numpy as np, unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=1, dtype="float32", low_latency=True) as buffer:
    /// ...     topk_idx, weights = np.array([[0]]), np.array([[0.5]], np.float32)
    /// ...     sent = buffer.low_latency_dispatch(np.ones((1, 8), np.float32), topk_idx)
    /// ...     buffer.combine_buffer("float32").numpy()[:] = sent.x * 6
    /// ...     buffer.low_latency_combine(None, topk_idx, weights, sent.handle).x[0, 0].item()
    /// 3.0
    #[pyo3(signature = (x, topk_idx, topk_weights, handle, *, quantised=false, stream=None))]
    fn low_latency_combine<'py>(
        this: &Bound<'py, Self>,
        x: Option<&Bound<'py, PyAny>>,
        topk_idx: &Bound<'py, PyAny>,
        topk_weights: &Bound<'py, PyAny>,
        handle: &Bound<'py, LowLatencyHandle>,
        quantised: bool,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<LowLatencyCombined> {
        Self::low_latency_combine_send(this, x, topk_idx, topk_weights, handle, quantised, stream)?
            .receive(this.py())
    }

    /// The first half of ``low_latency_combine``: waits for the weights of the others, and sends. ``receive()`` of the ``SentCombine`` is the
    /// second.
    ///
    /// >>> import numpy as np, unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=1, dtype="float32", low_latency=True) as buffer:
    /// ...     topk_idx, weights = np.array([[0]]), np.array([[0.5]], np.float32)
    /// ...     got = buffer.low_latency_dispatch(np.ones((1, 8), np.float32), topk_idx)
    /// ...     sent = buffer.low_latency_combine_send(got.x, topk_idx, weights, got.handle)
    /// ...     sent.receive().x[0, 0].item()
    /// 0.5
    #[pyo3(signature = (x, topk_idx, topk_weights, handle, *, quantised=false, stream=None))]
    fn low_latency_combine_send<'py>(
        this: &Bound<'py, Self>,
        x: Option<&Bound<'py, PyAny>>,
        topk_idx: &Bound<'py, PyAny>,
        topk_weights: &Bound<'py, PyAny>,
        handle: &Bound<'py, LowLatencyHandle>,
        quantised: bool,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<SentCombine> {
        let (me, handle) = (this.get(), &handle.get().handle);
        let outputs = Outputs::of(me, x.unwrap_or(topk_idx))?;
        let mut inputs = Inputs::new(me, "low_latency_combine", this.py(), stream)?;
        let rows = x.map(|x| inputs.rows("x", x, &[None, None, Some(me.hidden)])).transpose()?;
        let (indices, shape) = inputs.take_of(DType::I64, "topk_idx", topk_idx, &[None, None])?;
        let shape = [Some(shape[0]), Some(shape[1])];
        let (weights, _) = inputs.take_of(DType::F32, "topk_weights", topk_weights, &shape)?;
        let sent = inputs.run(|buffer, lender, stream| {
            let (indices, weights) = (lender.buf::<i64>(indices), lender.buf::<f32>(weights));
            let mut combine = match rows {
                Some((rows, _)) => ep::LowLatencyCombine::new(lender.input(rows), indices, weights, handle),
                None => ep::LowLatencyCombine::of_buffer(indices, weights, handle),
            };
            if quantised {
                combine = combine.quantised();
            }
            if let Some(stream) = stream {
                combine = combine.on(stream);
            }
            buffer.low_latency_combine_send(&combine)
        })?;
        Ok(SentCombine { buffer: this.clone().unbind(), outputs, sent: Mutex::new(Some(sent)) })
    }
}
