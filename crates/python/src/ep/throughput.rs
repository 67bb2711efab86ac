//! The calls of the throughput mode, and what they give.

#![expect(clippy::too_many_arguments, reason = "they are arguments of Python, by name")]

use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use unisono::DType;
use unisono::ep;

use super::buffer::{Buffer, Layout};
use super::inputs::{Given, Inputs};
use super::outputs::Outputs;

/// What a dispatch brought: N rows, by source rank and then by the token's index there. Made by ``Buffer.dispatch``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct Dispatched {
    /// ``[N, hidden]``, of the type that was sent.
    #[pyo3(get)]
    x: Py<PyAny>,
    /// ``[N, scales of a token]``, or None if none were sent.
    #[pyo3(get)]
    scales: Option<Py<PyAny>>,
    /// int64 ``[N, top-k]``: the expert's number on this rank, −1 where it lives elsewhere; or None if none were sent.
    #[pyo3(get)]
    topk_idx: Option<Py<PyAny>>,
    /// float32 ``[N, top-k]``: 0 where the expert lives elsewhere; or None if none were sent.
    #[pyo3(get)]
    topk_weights: Option<Py<PyAny>>,
    /// Selections of each expert of this rank, rounded up to the alignment; empty with ``worst_tokens``.
    #[pyo3(get)]
    tokens_per_expert: Vec<usize>,
    /// For ``combine``, and for doing the same again.
    #[pyo3(get)]
    handle: Py<Handle>,
}

/// The layout of a dispatch on all ranks. Made by ``Buffer.dispatch``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct Handle {
    handle: ep::Handle,
    outputs: Outputs,
}

/// What came of the tokens of a rank. Made by ``Buffer.combine``.
#[pyclass(frozen, module = "unisono.ep")]
pub(crate) struct Combined {
    /// ``[tokens, hidden]``, of the type that was combined.
    #[pyo3(get)]
    x: Py<PyAny>,
    /// float32 ``[tokens, top-k]``, or None if no weights were given.
    #[pyo3(get)]
    topk_weights: Option<Py<PyAny>>,
}

#[pymethods]
impl Handle {
    /// int32 ``[ranks, ranks]``: at ``[i][r]`` the number of tokens that ranks 0 to i send to rank r.
    #[getter]
    fn rank_prefix(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.handle.rank_prefix())
    }

    /// int32 ``[N]``: the index of each row's token at its source, −1 behind the last row.
    #[getter]
    fn source_tokens(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.handle.source_tokens())
    }

    /// bool ``[tokens, ranks]``: which tokens of this rank went to which rank.
    #[getter]
    fn is_token_in_rank(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.outputs.array(py, self.handle.is_token_in_rank())
    }

    /// Rows of what was dispatched: N.
    #[getter]
    fn rows(&self) -> usize {
        self.handle.rows()
    }

    /// Tokens that this rank sent.
    #[getter]
    fn tokens(&self) -> usize {
        self.handle.tokens()
    }
}

#[pymethods]
impl Buffer {
    /// Sends tokens to the ranks of their experts, each once to a rank, and returns a ``Dispatched`` when those for this rank are there.
    /// Every rank calls it, with any number of tokens of its own, none included.
    ///
    /// ``x`` is ``[tokens, hidden]`` of bfloat16, float16, float32 or float8_e4m3fn, no wider than the buffer's ``dtype``; ``topk_idx`` int64
    /// ``[tokens, top-k]``, the experts of each token, −1 for none; ``topk_weights`` float32 of the same shape; ``scales`` float32 or int32
    /// ``[tokens, any]``, at any strides. ``layout``, if it is known, is not computed again, and alone it may stand for ``topk_idx``.
    /// ``expert_alignment`` rounds ``tokens_per_expert`` up. With ``worst_tokens`` outputs have so many rows, however many come: rows behind
    /// the last have index −1, weight 0 and unspecified elements, and nobody waits for the number. ``multiprocessors``: the most of the GPU that
    /// this call takes (default: as the buffer says).
    ///
    /// Raises ``ArgumentError`` before anything is sent, or if more rows came than ``worst_tokens`` (the buffer still works);
    /// ``MismatchError``, ``PeerDiedError``, ``TimeoutError`` naming the rank; ``GivenUpError`` if this rank was masked.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     with unisono.ep.Buffer(rank, 8, experts=2, dtype="float32") as buffer:
    /// ...         x = np.full((2, 8), rank.rank + 1.0, np.float32)
    /// ...         sent = buffer.dispatch(x, np.array([[0], [1]]))  # one token for each rank
    /// ...         return sent.x[:, 0].tolist(), sent.topk_idx.tolist(), sent.tokens_per_expert
    /// >>> unisono.on_threads(2, main)
    /// [([1.0, 2.0], [[0], [0]], [2]), ([1.0, 2.0], [[0], [0]], [2])]
    #[pyo3(signature = (x, topk_idx=None, *, topk_weights=None, scales=None, layout=None, expert_alignment=1, worst_tokens=None, multiprocessors=None, stream=None))]
    fn dispatch<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        topk_idx: Option<&Bound<'py, PyAny>>,
        topk_weights: Option<&Bound<'py, PyAny>>,
        scales: Option<&Bound<'py, PyAny>>,
        layout: Option<&Bound<'py, Layout>>,
        expert_alignment: usize,
        worst_tokens: Option<usize>,
        multiprocessors: Option<u32>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Dispatched> {
        let (py, outputs) = (x.py(), Outputs::of(self, x)?);
        let mut inputs = Inputs::new(self, "dispatch", py, stream)?;
        let (rows, shape) = inputs.rows("x", x, &[None, Some(self.hidden)])?;
        let tokens = shape[0];
        let scales = scales.map(|scales| inputs.scales(scales, tokens)).transpose()?;
        let mut take = |dtype, what, object: &Bound<'py, PyAny>| {
            let (given, shape) = inputs.take_of(dtype, what, object, &[Some(tokens), None])?;
            PyResult::Ok((given, shape[1]))
        };
        let indices = topk_idx.map(|indices| take(DType::I64, "topk_idx", indices)).transpose()?;
        let weights = topk_weights.map(|weights| take(DType::F32, "topk_weights", weights)).transpose()?;
        let layout = layout.map(|layout| &layout.get().layout);
        let sent = inputs.run(|buffer, lender, stream| {
            let mut dispatch =
                ep::Dispatch::new(lender.tokens(rows, scales)).expert_alignment(expert_alignment);
            if let Some((indices, top_k)) = indices {
                dispatch = dispatch.top_k(lender.buf::<i64>(indices), top_k);
            }
            if let Some((weights, _)) = weights {
                dispatch = dispatch.weights(lender.buf::<f32>(weights));
            }
            if let Some(layout) = layout {
                dispatch = dispatch.layout(layout);
            }
            if let Some(rows) = worst_tokens {
                dispatch = dispatch.worst_tokens(rows);
            }
            if let Some(count) = multiprocessors {
                dispatch = dispatch.multiprocessors(count);
            }
            if let Some(stream) = stream {
                dispatch = dispatch.on(stream);
            }
            buffer.dispatch(&dispatch)
        })?;
        Ok(Dispatched {
            x: outputs.array(py, sent.x)?,
            scales: outputs.array_of(py, sent.scales)?,
            topk_idx: outputs.array_of(py, sent.topk_idx)?,
            topk_weights: outputs.array_of(py, sent.topk_weights)?,
            tokens_per_expert: sent.tokens_per_expert,
            handle: Py::new(py, Handle { handle: sent.handle, outputs: outputs.later(py) })?,
        })
    }

    /// Sends other tokens the way of an earlier dispatch, whose ``handle`` every rank gives: as many as that had. Returns ``[N, hidden]`` in
    /// the same order, and the scales or None. No counts are exchanged. Rows of ranks that were masked since then are zeros.
    ///
    /// Raises as ``dispatch``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=2, dtype="float32") as buffer:
    /// ...     sent = buffer.dispatch(np.zeros((2, 8), np.float32), np.array([[0], [-1]]))
    /// ...     x, scales = buffer.dispatch_cached(np.ones((2, 8), np.float32), sent.handle)
    /// ...     x.shape, scales
    /// ((1, 8), None)
    #[pyo3(signature = (x, handle, *, scales=None, multiprocessors=None, stream=None))]
    fn dispatch_cached<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        handle: &Bound<'py, Handle>,
        scales: Option<&Bound<'py, PyAny>>,
        multiprocessors: Option<u32>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Py<PyAny>, Option<Py<PyAny>>)> {
        let (py, outputs, handle) = (x.py(), Outputs::of(self, x)?, &handle.get().handle);
        let mut inputs = Inputs::new(self, "dispatch_cached", py, stream)?;
        let (rows, _) = inputs.rows("x", x, &[Some(handle.tokens()), Some(self.hidden)])?;
        let scales = scales.map(|scales| inputs.scales(scales, handle.tokens())).transpose()?;
        let (x, scales) = inputs.run(|buffer, lender, stream| {
            let mut dispatch = ep::CachedDispatch::new(lender.tokens(rows, scales), handle);
            if let Some(count) = multiprocessors {
                dispatch = dispatch.multiprocessors(count);
            }
            if let Some(stream) = stream {
                dispatch = dispatch.on(stream);
            }
            buffer.dispatch_cached(&dispatch)
        })?;
        Ok((outputs.array(py, x)?, outputs.array_of(py, scales)?))
    }

    /// Brings results back to the sources of their tokens, as a ``Combined``: the unweighted sum over the ranks that a token went to, in the
    /// order of ranks, then ``bias`` (an array ``[tokens, hidden]``, or a pair of them), all in float32 and rounded once. Every rank calls it,
    /// with a ``handle`` of the same dispatch. Ranks that are masked add nothing.
    ///
    /// ``x`` is ``[N, hidden]`` of bfloat16, float16 or float32, a row for each that was dispatched, in that order; or ``[N, count, hidden]``,
    /// where the rows of one token are added before they travel. ``topk_weights``, float32 ``[N, top-k]``, return too, and are added.
    ///
    /// Raises as ``dispatch``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=2, dtype="float32") as buffer:
    /// ...     sent = buffer.dispatch(np.ones((1, 8), np.float32), np.array([[0, 1]]))
    /// ...     of_experts = np.stack([sent.x * 2, sent.x * 3], axis=1)  # what both experts made of it
    /// ...     buffer.combine(of_experts, sent.handle, bias=np.full((1, 8), 0.5, np.float32)).x[0, 0].item()
    /// 5.5
    #[pyo3(signature = (x, handle, *, topk_weights=None, bias=None, multiprocessors=None, stream=None))]
    fn combine<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        handle: &Bound<'py, Handle>,
        topk_weights: Option<&Bound<'py, PyAny>>,
        bias: Option<&Bound<'py, PyAny>>,
        multiprocessors: Option<u32>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Combined> {
        let (py, outputs, handle) = (x.py(), Outputs::of(self, x)?, &handle.get().handle);
        let mut inputs = Inputs::new(self, "combine", py, stream)?;
        let (count, hidden) = (Some(handle.rows()), Some(self.hidden));
        let sizes: &[_] =
            if inputs.shape("x", x)?.len() == 3 { &[count, None, hidden] } else { &[count, hidden] };
        let (rows, shape) = inputs.rows("x", x, sizes)?;
        let per_token = if shape.len() == 3 { shape[1] } else { 1 };
        let weights = topk_weights
            .map(|weights| inputs.take_of(DType::F32, "topk_weights", weights, &[count, None]))
            .transpose()?;
        let mut one = |bias: &Bound<'py, PyAny>| -> PyResult<Given> {
            Ok(inputs.rows("bias", bias, &[Some(handle.tokens()), hidden])?.0)
        };
        let bias: Vec<Given> = match bias {
            None => Vec::new(),
            Some(bias) if bias.is_instance_of::<PyTuple>() || bias.is_instance_of::<PyList>() => {
                let (first, second): (Bound<'py, PyAny>, Bound<'py, PyAny>) = bias.extract()?;
                vec![one(&first)?, one(&second)?]
            }
            Some(bias) => vec![one(bias)?],
        };
        let combined = inputs.run(|buffer, lender, stream| {
            let mut combine = ep::Combine::new(lender.input(rows), handle).per_token(per_token);
            if let Some((weights, _)) = weights {
                combine = combine.weights(lender.buf::<f32>(weights));
            }
            if let [first, ..] = bias[..] {
                combine = combine.bias(lender.input(first));
            }
            if let [_, second] = bias[..] {
                combine = combine.second_bias(lender.input(second));
            }
            if let Some(count) = multiprocessors {
                combine = combine.multiprocessors(count);
            }
            if let Some(stream) = stream {
                combine = combine.on(stream);
            }
            buffer.combine(&combine)
        })?;
        Ok(Combined {
            x: outputs.array(py, combined.x)?,
            topk_weights: outputs.array_of(py, combined.topk_weights)?,
        })
    }
}
