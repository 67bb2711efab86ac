//! The operations of a `Communicator`, and torch's names for some of them.
//!
//! Over 500 lines because each operation has its documentation, with an example that the tests run.
#![expect(clippy::too_many_arguments, reason = "they are arguments of Python, by name")]

use pyo3::prelude::*;
use unisono::fused::NormOutput;
use unisono::{DType, Kind};

use crate::array::Array;
use crate::call::{Manner, Parts, Side};
use crate::communicator::Communicator;
use crate::options::reduction;

/// An argument that may be left out.
type Maybe<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// A side that is read.
const fn source<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Side<'a, 'py> {
    Side { what: "x", object: Some(object), is_target: false }
}

/// A side that is written.
const fn target<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Side<'a, 'py> {
    Side { what: "out", object: Some(object), is_target: true }
}

/// In place, or from `x` to `out`.
#[inline]
fn on_x<'py>(
    this: &Bound<'py, Communicator>,
    kind: Kind,
    x: &Bound<'py, PyAny>,
    out: Maybe<'_, 'py>,
    manner: &Manner<'_, 'py>,
) -> PyResult<Py<PyAny>> {
    match out {
        None => Communicator::perform(this, kind, &[Side { is_target: true, ..source(x) }], x, manner),
        Some(out) => Communicator::perform(this, kind, &[source(x), target(out)], out, manner),
    }
}

#[pymethods]
impl Communicator {
    /// Replaces ``x`` on every rank by the reduction of the ``x`` of all ranks, element by element; with ``out``, writes it there and
    /// leaves ``x``. Every rank calls it, with the same dtype, number of elements and ``op``: "sum", "prod", "min", "max", "avg",
    /// "bit_and", "bit_or", "bit_xor", "premul_sum:SCALAR" (each rank its own scalar), or one of torch's ``ReduceOp``. All ranks get
    /// the same bits, in every run. Returns the array that holds the result, or a ``Work``.
    ///
    /// Raises ``UnsupportedError`` for a reduction that the dtype does not have; ``MismatchError`` on all ranks if they differ.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.all_reduce(np.array([1, rank.rank]), "max").tolist())
    /// [[1, 1], [1, 1]]
    #[pyo3(signature = (x, op=None, *, out=None, stream=None, async_op=false, timeout=None),
           text_signature = "($self, x, op='sum', *, out=None, stream=None, async_op=False, timeout=None)")]
    fn all_reduce<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        op: Maybe<'_, 'py>,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let kind = Kind::AllReduce { op: reduction(op)? };
        on_x(this, kind, x, out, &Manner { stream, is_async: async_op, timeout })
    }

    /// Replaces ``x`` on every rank by the ``x`` of ``root``; with ``out``, writes it there (on the root too). Every rank calls it, with
    /// the same dtype, number of elements and root. Returns the array that holds the result, or a ``Work``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.broadcast(np.array([rank.rank]), root=1).tolist())
    /// [[1], [1]]
    #[pyo3(signature = (x, root=0, *, out=None, stream=None, async_op=false, timeout=None))]
    fn broadcast<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        root: u32,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let (kind, manner) = (Kind::Broadcast { root }, Manner { stream, is_async: async_op, timeout });
        match out {
            None => {
                let side = Side { is_target: root as usize != this.get().rank, ..source(x) };
                Self::perform(this, kind, &[side], x, &manner)
            }
            Some(_) => on_x(this, kind, x, out, &manner),
        }
    }

    /// Gathers ``x`` of all ranks into ``out``, in rank order, on every rank: ``out`` has world size times the elements of ``x``. Without
    /// ``out``, ``x`` has room for all, and this rank's part already lies at its place. Every rank calls it, with equal parts. Returns the
    /// array that holds the result, or a ``Work``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     return rank.all_gather(np.array([rank.rank, 7]), out=np.zeros((2, 2), dtype=int)).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[[0, 7], [1, 7]], [[0, 7], [1, 7]]]
    #[pyo3(signature = (x, *, out=None, stream=None, async_op=false, timeout=None))]
    fn all_gather<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        on_x(this, Kind::AllGather, x, out, &Manner { stream, is_async: async_op, timeout })
    }

    /// Replaces ``x`` of ``root`` by the reduction of the ``x`` of all ranks, or writes it to ``out`` of the root (None on the others).
    /// The other ranks' arrays stay as they are. Every rank calls it; see ``all_reduce``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.reduce(np.ones(2), root=1).tolist())
    /// [[1.0, 1.0], [2.0, 2.0]]
    #[pyo3(signature = (x, op=None, *, root=0, out=None, stream=None, async_op=false, timeout=None),
           text_signature = "($self, x, op='sum', *, root=0, out=None, stream=None, async_op=False, timeout=None)")]
    fn reduce<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        op: Maybe<'_, 'py>,
        root: u32,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let kind = Kind::Reduce { op: reduction(op)?, root };
        on_x(this, kind, x, out, &Manner { stream, is_async: async_op, timeout })
    }

    /// Reduces ``x``, which has world size times the elements of ``out``, and writes to ``out`` this rank's part of the result. Without
    /// ``out`` the part is left in ``x``, at its place. Every rank calls it; see ``all_reduce``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.reduce_scatter(np.arange(4), out=np.zeros(2, dtype=int)).tolist())
    /// [[0, 2], [4, 6]]
    #[pyo3(signature = (x, op=None, *, out=None, stream=None, async_op=false, timeout=None),
           text_signature = "($self, x, op='sum', *, out=None, stream=None, async_op=False, timeout=None)")]
    fn reduce_scatter<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        op: Maybe<'_, 'py>,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let kind = Kind::ReduceScatter { op: reduction(op)? };
        on_x(this, kind, x, out, &Manner { stream, is_async: async_op, timeout })
    }

    /// Gathers ``x`` of all ranks into ``out`` of ``root``, in rank order; ``out`` is None on the other ranks. Every rank calls it, with
    /// equal parts. Returns ``out``, or a ``Work``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     out = np.zeros(2, dtype=int) if rank.rank == 0 else None
    /// ...     return rank.gather(np.array([rank.rank + 5]), out=out)
    /// >>> unisono.on_threads(2, main)
    /// [array([5, 6]), None]
    #[pyo3(signature = (x, root=0, *, out=None, stream=None, async_op=false, timeout=None))]
    fn gather<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        root: u32,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let sides = [source(x), Side { what: "out", object: out, is_target: true }];
        let manner = Manner { stream, is_async: async_op, timeout };
        let none = this.py().None().into_bound(this.py());
        Self::perform(this, Kind::Gather { root }, &sides, out.unwrap_or(&none), &manner)
    }

    /// Hands every rank its part of ``x`` of ``root``, in rank order; ``x`` is None on the other ranks. Every rank calls it, with equal
    /// ``out``. Returns ``out``, or a ``Work``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     x = np.arange(4) if rank.rank == 0 else None
    /// ...     return rank.scatter(x, out=np.zeros(2, dtype=int)).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[0, 1], [2, 3]]
    #[pyo3(signature = (x, root=0, *, out, stream=None, async_op=false, timeout=None))]
    fn scatter<'py>(
        this: &Bound<'py, Self>,
        x: Option<&Bound<'py, PyAny>>,
        root: u32,
        out: &Bound<'py, PyAny>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let sides = [Side { what: "x", object: x, is_target: false }, target(out)];
        Self::perform(
            this,
            Kind::Scatter { root },
            &sides,
            out,
            &Manner { stream, is_async: async_op, timeout },
        )
    }

    /// Writes what rank r has as this rank's part of its ``x`` to part r of ``out`` (or of ``x`` itself), for all ranks r. Every rank calls
    /// it, with arrays of world size equal parts. Returns the array that holds the result, or a ``Work``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.all_to_all(np.array([0, 1]) + 10 * rank.rank).tolist())
    /// [[0, 10], [1, 11]]
    #[pyo3(signature = (x, *, out=None, stream=None, async_op=false, timeout=None))]
    fn all_to_all<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        on_x(this, Kind::AllToAll, x, out, &Manner { stream, is_async: async_op, timeout })
    }

    /// As ``all_gather``, with parts of any size: ``counts`` are the elements of every rank's part, equal on all ranks, and ``offsets``
    /// (each rank's own; default: one after the other) where they lie in ``out``, in elements.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     return rank.all_gather_v(np.full(1 + rank.rank, rank.rank), [1, 2], out=np.zeros(3, dtype=int)).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[0, 1, 1], [0, 1, 1]]
    #[pyo3(signature = (x, counts, *, out, offsets=None, stream=None, async_op=false, timeout=None))]
    fn all_gather_v<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        counts: Vec<usize>,
        out: &Bound<'py, PyAny>,
        offsets: Option<Vec<usize>>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let (sides, parts) = ([source(x), target(out)], vec![Parts { counts, offsets }]);
        let manner = Manner { stream, is_async: async_op, timeout };
        Self::perform_with(this, Kind::AllGatherV, &sides, parts, out, &manner)
    }

    /// As ``reduce_scatter`` into ``out``, with parts of any size; see ``all_gather_v``. ``offsets`` are those of ``x``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     return rank.reduce_scatter_v(np.arange(3), [1, 2], out=np.zeros(1 + rank.rank, dtype=int)).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[0], [2, 4]]
    #[pyo3(signature = (x, counts, *, out, op=None, offsets=None, stream=None, async_op=false, timeout=None),
           text_signature = "($self, x, counts, *, out, op='sum', offsets=None, stream=None, async_op=False, timeout=None)")]
    fn reduce_scatter_v<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        counts: Vec<usize>,
        out: &Bound<'py, PyAny>,
        op: Maybe<'_, 'py>,
        offsets: Option<Vec<usize>>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let (sides, parts) = ([source(x), target(out)], vec![Parts { counts, offsets }]);
        let (kind, manner) =
            (Kind::ReduceScatterV { op: reduction(op)? }, Manner { stream, is_async: async_op, timeout });
        Self::perform_with(this, kind, &sides, parts, out, &manner)
    }

    /// As ``gather``, with parts of any size; see ``all_gather_v``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     out = np.zeros(3, dtype=int) if rank.rank == 1 else None
    /// ...     return rank.gather_v(np.full(2 - rank.rank, 4 + rank.rank), [2, 1], root=1, out=out)
    /// >>> unisono.on_threads(2, main)
    /// [None, array([4, 4, 5])]
    #[pyo3(signature = (x, counts, *, root=0, out=None, offsets=None, stream=None, async_op=false, timeout=None))]
    fn gather_v<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        counts: Vec<usize>,
        root: u32,
        out: Maybe<'_, 'py>,
        offsets: Option<Vec<usize>>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let sides = [source(x), Side { what: "out", object: out, is_target: true }];
        let (parts, manner) =
            (vec![Parts { counts, offsets }], Manner { stream, is_async: async_op, timeout });
        let none = this.py().None().into_bound(this.py());
        Self::perform_with(this, Kind::GatherV { root }, &sides, parts, out.unwrap_or(&none), &manner)
    }

    /// As ``scatter``, with parts of any size; see ``all_gather_v``. ``offsets`` are those of ``x``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     x = np.arange(3) if rank.rank == 0 else None
    /// ...     return rank.scatter_v(x, [1, 2], out=np.zeros(1 + rank.rank, dtype=int)).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[0], [1, 2]]
    #[pyo3(signature = (x, counts, *, out, root=0, offsets=None, stream=None, async_op=false, timeout=None))]
    fn scatter_v<'py>(
        this: &Bound<'py, Self>,
        x: Option<&Bound<'py, PyAny>>,
        counts: Vec<usize>,
        out: &Bound<'py, PyAny>,
        root: u32,
        offsets: Option<Vec<usize>>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let sides = [Side { what: "x", object: x, is_target: false }, target(out)];
        let (parts, manner) =
            (vec![Parts { counts, offsets }], Manner { stream, is_async: async_op, timeout });
        Self::perform_with(this, Kind::ScatterV { root }, &sides, parts, out, &manner)
    }

    /// As ``all_to_all`` into ``out``, with parts of any size: ``send_counts`` tells what of ``x`` goes to each rank, ``receive_counts``
    /// what comes from each, in elements; offsets as in ``all_gather_v``. What rank a sends to b must be what b expects of a.
    ///
    /// Raises ``MismatchError``, naming both ranks, if one expects what the other does not send.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     send, receive = ([1, 2], [1, 1]) if rank.rank == 0 else ([1, 0], [2, 0])
    /// ...     x = np.arange(sum(send)) + 10 * rank.rank
    /// ...     return rank.all_to_all_v(x, np.zeros(2, dtype=int), send_counts=send, receive_counts=receive).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[0, 10], [1, 2]]
    #[pyo3(signature = (x, out, *, send_counts, receive_counts, send_offsets=None, receive_offsets=None, stream=None, async_op=false, timeout=None))]
    fn all_to_all_v<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
        send_counts: Vec<usize>,
        receive_counts: Vec<usize>,
        send_offsets: Option<Vec<usize>>,
        receive_offsets: Option<Vec<usize>>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let parts = vec![
            Parts { counts: send_counts, offsets: send_offsets },
            Parts { counts: receive_counts, offsets: receive_offsets },
        ];
        let manner = Manner { stream, is_async: async_op, timeout };
        Self::perform_with(this, Kind::AllToAllV, &[source(x), target(out)], parts, out, &manner)
    }

    /// As ``all_to_all_v``, with counts that lie in arrays, on the GPU if the data does: each rank knows what it sends, and is told what it
    /// received, in the order of the stream. ``send_counts`` are elements for each rank, ``send_offsets`` where their parts begin in ``x``
    /// (default: one after the other); ``receive_counts`` are written. Each rank fills an equal share of ``out`` at most; what comes from
    /// rank r lies at the beginning of share r. Lists are of uint32, uint64, int32 or int64, with an element for each rank. Returns
    /// ``out``, or a ``Work``.
    ///
    /// Raises ``CountsError``, naming both ranks, if a part is more than the receiver has room for.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     send = np.array([[1, 2], [1, 0]][rank.rank])
    /// ...     x, out, receive = np.arange(3) + 10 * rank.rank, np.full(6, -1), np.zeros(2, dtype=int)
    /// ...     rank.all_to_all_counted(x, out, send_counts=send, receive_counts=receive)
    /// ...     return receive.tolist(), out.tolist()
    /// >>> unisono.on_threads(2, main)
    /// [([1, 1], [0, -1, -1, 10, -1, -1]), ([2, 0], [1, 2, -1, -1, -1, -1])]
    #[pyo3(signature = (x, out, *, send_counts, receive_counts, send_offsets=None, stream=None, async_op=false, timeout=None))]
    fn all_to_all_counted<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
        send_counts: &Bound<'py, PyAny>,
        receive_counts: &Bound<'py, PyAny>,
        send_offsets: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let side = |what, object, is_target| Side { what, object: Some(object), is_target };
        let mut sides = vec![
            source(x),
            target(out),
            side("send_counts", send_counts, false),
            side("receive_counts", receive_counts, true),
        ];
        sides.extend(send_offsets.map(|offsets| side("send_offsets", offsets, false)));
        let manner = Manner { stream, is_async: async_op, timeout };
        Self::perform_with(this, Kind::AllToAllCounted, &sides, Vec::new(), out, &manner)
    }

    /// As ``all_reduce`` by sum, with 8 bits for each element on the way (f8e4m3 and a scale for each 128 elements): faster between GPUs,
    /// and rounded. Of float16, bfloat16 and float32. All ranks get the same bits.
    ///
    /// >>> import numpy as np, unisono
    /// >>> x = np.array([448, 17], dtype=np.float32)  # 17 travels as 16
    /// >>> unisono.on_threads(2, lambda rank: rank.all_reduce_quantised(x.copy()).tolist())
    /// [[896.0, 32.0], [896.0, 32.0]]
    #[pyo3(signature = (x, *, out=None, stream=None, async_op=false, timeout=None))]
    fn all_reduce_quantised<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        out: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        on_x(this, Kind::AllReduceQuantised, x, out, &Manner { stream, is_async: async_op, timeout })
    }

    /// Sums rows over all ranks, adds the residual, and normalises: s = the sum of ``x``; ``residual_out`` = s + ``residual`` (default:
    /// what lies in ``residual_out``); ``out`` = residual_out / sqrt(mean of its squares + ``epsilon``) * ``weight``. ``x``, the residuals
    /// and ``out`` are (tokens, hidden), of float16 or bfloat16; ``weight`` has hidden elements. ``out`` may be float8_e4m3fn: divided by
    /// ``scale`` (one float32), or with ``scales`` (tokens float32, which are written), by one for each token. Every rank calls it, with
    /// equal shapes, and has its own residual. Returns ``out``, or a ``Work``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     x, residual = np.full((3, 8), 1.5, dtype=np.float16), np.ones((3, 8), dtype=np.float16)
    /// ...     weight, out = np.full(8, 3, dtype=np.float16), np.zeros((3, 8), dtype=np.float16)
    /// ...     rank.all_reduce_rms_norm(x, weight, residual_out=residual, out=out, epsilon=0)
    /// ...     return float(residual[0, 0]), float(out[2, 7])
    /// >>> unisono.on_threads(2, main)
    /// [(4.0, 3.0), (4.0, 3.0)]
    #[pyo3(signature = (x, weight, *, residual_out, out, residual=None, epsilon=1e-6, scale=None, scales=None, stream=None, async_op=false, timeout=None))]
    fn all_reduce_rms_norm<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        weight: &Bound<'py, PyAny>,
        residual_out: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
        residual: Maybe<'_, 'py>,
        epsilon: f32,
        scale: Maybe<'_, 'py>,
        scales: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let site = |what| this.get().site("all_reduce_rms_norm", what);
        let hidden = Array::new(weight, site("weight"), None)?.memory.count;
        let is_fp8 = Array::new(out, site("out"), None)?.memory.dtype == DType::F8E4M3;
        let output = match (is_fp8, scale, scales) {
            (false, None, None) => NormOutput::Same,
            (true, Some(_), None) => NormOutput::Fp8,
            (true, None, Some(_)) => NormOutput::Fp8PerToken,
            (true, ..) => {
                return Err(site("scale or scales").refuse(this.py(), "one of them", "none or both"));
            }
            (false, ..) => {
                return Err(site("out").refuse(
                    this.py(),
                    "float8_e4m3fn, as there are scales",
                    "another type",
                ));
            }
        };
        let kind = Kind::AllReduceRmsNorm {
            hidden: u32::try_from(hidden).unwrap_or(u32::MAX),
            epsilon,
            output,
            is_in_place: residual.is_none(),
        };
        let side = |what, object, is_target| Side { what, object: Some(object), is_target };
        let mut sides = vec![
            source(x),
            side("residual", residual.unwrap_or(residual_out), false),
            side("residual_out", residual_out, true),
            side("weight", weight, false),
            target(out),
        ];
        sides.extend(scale.map(|scale| side("scale", scale, false)));
        sides.extend(scales.map(|scales| side("scales", scales, true)));
        let manner = Manner { stream, is_async: async_op, timeout };
        Self::perform_with(this, kind, &sides, Vec::new(), out, &manner)
    }

    /// Replaces each of this rank's ``arrays``, as many on every rank and all of one size, by the reduction of all arrays of all ranks:
    /// one on each of this rank's GPUs (``devices=``), or several on the host. ``streams``: one for each array on a GPU. Returns the list.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: [a.tolist() for a in rank.all_reduce_multi([np.ones(1), np.ones(1)])])
    /// [[[4.0], [4.0]], [[4.0], [4.0]]]
    #[pyo3(signature = (arrays, op=None, *, streams=None, timeout=None),
           text_signature = "($self, arrays, op='sum', *, streams=None, timeout=None)")]
    fn all_reduce_multi<'py>(
        this: &Bound<'py, Self>,
        arrays: Vec<Bound<'py, PyAny>>,
        op: Maybe<'_, 'py>,
        streams: Option<Vec<Bound<'py, PyAny>>>,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let kind = Kind::AllReduceMulti { op: reduction(op)? };
        Self::perform_on_each(this, kind, &arrays, streams, timeout)?;
        Ok(arrays)
    }

    /// Writes array ``root_array`` of rank ``root`` to each of the ``arrays`` of every rank; see ``all_reduce_multi``. Ranks may have
    /// different numbers of them. Returns the list.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     arrays = [np.array([2 * rank.rank]), np.array([2 * rank.rank + 1])]
    /// ...     return [array.tolist() for array in rank.broadcast_multi(arrays, 1, root_array=1)]
    /// >>> unisono.on_threads(2, main)
    /// [[[3], [3]], [[3], [3]]]
    #[pyo3(signature = (arrays, root=0, *, root_array=0, streams=None, timeout=None))]
    fn broadcast_multi<'py>(
        this: &Bound<'py, Self>,
        arrays: Vec<Bound<'py, PyAny>>,
        root: u32,
        root_array: u32,
        streams: Option<Vec<Bound<'py, PyAny>>>,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let kind = Kind::BroadcastMulti { root, buffer: root_array };
        Self::perform_on_each(this, kind, &arrays, streams, timeout)?;
        Ok(arrays)
    }

    /// Sends ``x`` to rank ``to``, which receives it with the same dtype, number of elements and ``tag``. Returns ``x`` when it may be used
    /// again: a message of up to 16 KiB does not wait for its receiver. Messages of one pair of ranks keep their order for each tag.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     if rank.rank == 0:
    /// ...         return rank.send(np.array([5]), 1).tolist()
    /// ...     return rank.recv(np.array([0]), 0).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[5], [5]]
    #[pyo3(signature = (x, to, *, tag=0, stream=None, async_op=false, timeout=None))]
    fn send<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        to: u32,
        tag: u32,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        Self::perform(
            this,
            Kind::Send { to, tag },
            &[source(x)],
            x,
            &Manner { stream, is_async: async_op, timeout },
        )
    }

    /// Receives into ``x`` the next message with ``tag`` that rank ``source`` sends to this one. Returns ``x``, or a ``Work``.
    ///
    /// Raises ``MismatchError``, on both ranks, if the message has another dtype or size.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     if rank.rank == 0:
    /// ...         return rank.recv(np.zeros(2), 1, tag=3).tolist()
    /// ...     return rank.send(np.ones(2), 0, tag=3).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[1.0, 1.0], [1.0, 1.0]]
    #[pyo3(signature = (x, source, *, tag=0, stream=None, async_op=false, timeout=None))]
    fn recv<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        source: u32,
        tag: u32,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let side = Side { what: "x", object: Some(x), is_target: true };
        Self::perform(
            this,
            Kind::Recv { from: source, tag },
            &[side],
            x,
            &Manner { stream, is_async: async_op, timeout },
        )
    }

    /// Receives into ``x`` the next message with ``tag`` from whichever rank sends one, and returns that rank.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     if rank.rank == 0:
    /// ...         return rank.recv_any(np.array([0]))
    /// ...     rank.send(np.array([1]), 0)
    /// >>> unisono.on_threads(2, main)
    /// [1, None]
    #[pyo3(signature = (x, *, tag=0, stream=None, timeout=None))]
    fn recv_any<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        tag: u32,
        stream: Maybe<'_, 'py>,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<usize> {
        Self::receive_any(this, x, tag, &Manner { stream, is_async: false, timeout })
    }

    /// Sends ``x`` to rank ``to`` and receives ``out`` from rank ``source``, both at once: ranks that exchange messages of any size do
    /// not wait for each other in a circle. Returns ``out``, or a ``Work``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     other = 1 - rank.rank
    /// ...     return rank.send_recv(np.array([rank.rank]), np.array([9]), to=other, source=other).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[1], [0]]
    #[pyo3(signature = (x, out, *, to, source, tag=0, stream=None, async_op=false, timeout=None))]
    fn send_recv<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
        to: u32,
        source: u32,
        tag: u32,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let sides = [Side { what: "x", object: Some(x), is_target: false }, target(out)];
        let manner = Manner { stream, is_async: async_op, timeout };
        Self::perform(this, Kind::SendRecv { to, from: source, tag }, &sides, out, &manner)
    }

    /// Returns when every rank has entered it; with ``stream``, when it is enqueued there. Every rank calls it.
    ///
    /// >>> import unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.barrier())
    /// [None, None]
    #[pyo3(signature = (*, stream=None, async_op=false, timeout=None))]
    fn barrier<'py>(
        this: &Bound<'py, Self>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let none = this.py().None().into_bound(this.py());
        Self::perform(this, Kind::Barrier, &[], &none, &Manner { stream, is_async: async_op, timeout })
    }

    /// torch's name of ``all_gather(x, out=out)``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.all_gather_into_tensor(np.zeros(2), np.ones(1)).tolist())
    /// [[1.0, 1.0], [1.0, 1.0]]
    #[pyo3(signature = (out, x, *, stream=None, async_op=false, timeout=None))]
    fn all_gather_into_tensor<'py>(
        this: &Bound<'py, Self>,
        out: &Bound<'py, PyAny>,
        x: &Bound<'py, PyAny>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        Self::all_gather(this, x, Some(out), stream, async_op, timeout)
    }

    /// torch's name of ``reduce_scatter(x, op, out=out)``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.on_threads(2, lambda rank: rank.reduce_scatter_tensor(np.zeros(1), np.ones(2)).tolist())
    /// [[2.0], [2.0]]
    #[pyo3(signature = (out, x, op=None, *, stream=None, async_op=false, timeout=None),
           text_signature = "($self, out, x, op='sum', *, stream=None, async_op=False, timeout=None)")]
    fn reduce_scatter_tensor<'py>(
        this: &Bound<'py, Self>,
        out: &Bound<'py, PyAny>,
        x: &Bound<'py, PyAny>,
        op: Maybe<'_, 'py>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        Self::reduce_scatter(this, x, op, Some(out), stream, async_op, timeout)
    }

    /// torch's name of ``all_to_all(x, out=out)``, and, with sizes of parts (rows of the first dimension), of ``all_to_all_v``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     return rank.all_to_all_single(np.zeros((2, 2)), np.full((2, 2), float(rank.rank)), [1, 1], [1, 1]).tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]]
    #[pyo3(signature = (out, x, output_split_sizes=None, input_split_sizes=None, *, stream=None, async_op=false, timeout=None))]
    fn all_to_all_single<'py>(
        this: &Bound<'py, Self>,
        out: &Bound<'py, PyAny>,
        x: &Bound<'py, PyAny>,
        output_split_sizes: Option<Vec<usize>>,
        input_split_sizes: Option<Vec<usize>>,
        stream: Maybe<'_, 'py>,
        async_op: bool,
        timeout: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        if output_split_sizes.is_none() && input_split_sizes.is_none() {
            return Self::all_to_all(this, x, Some(out), stream, async_op, timeout);
        }
        let (site, ranks) = (|what| this.get().site("all_to_all_single", what), this.get().world_size);
        let counts = |what, array: &Bound<'py, PyAny>, sizes: Option<Vec<usize>>| -> PyResult<Vec<usize>> {
            let (rows, elements) = (array.len()?, Array::new(array, site(what), None)?.memory.count);
            let row = elements.checked_div(rows).unwrap_or(0);
            Ok(sizes
                .unwrap_or_else(|| vec![rows / ranks; ranks])
                .iter()
                .map(|size| size.saturating_mul(row))
                .collect())
        };
        let send = counts("x", x, input_split_sizes)?;
        let receive = counts("out", out, output_split_sizes)?;
        Self::all_to_all_v(this, x, out, send, receive, None, None, stream, async_op, timeout)
    }

    /// torch's name of ``send(x, to, tag=tag, async_op=True)``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     work = rank.isend(np.ones(1), 1) if rank.rank == 0 else rank.irecv(np.zeros(1), 0)
    /// ...     return work.wait().tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[1.0], [1.0]]
    #[pyo3(signature = (x, to, *, tag=0, stream=None))]
    fn isend<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        to: u32,
        tag: u32,
        stream: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        Self::send(this, x, to, tag, stream, true, None)
    }

    /// torch's name of ``recv(x, source, tag=tag, async_op=True)``.
    ///
    /// >>> import numpy as np, unisono
    /// >>> def main(rank):
    /// ...     work = rank.irecv(np.zeros(1), 1) if rank.rank == 0 else rank.isend(np.ones(1), 0)
    /// ...     return work.wait().tolist()
    /// >>> unisono.on_threads(2, main)
    /// [[1.0], [1.0]]
    #[pyo3(signature = (x, source, *, tag=0, stream=None))]
    fn irecv<'py>(
        this: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        source: u32,
        tag: u32,
        stream: Maybe<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        Self::recv(this, x, source, tag, stream, true, None)
    }
}
