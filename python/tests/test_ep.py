"""Expert parallelism: both modes against what numpy computes from the inputs of all ranks, and what is refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest

import unisono
from unisono import ep, errors

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


class Inputs:
    """Random tokens of each rank, and where they go; `blocks` has the experts of each rank."""

    def __init__(self, seed, ranks, hidden, experts, top_k, most=40, dtype=np.float32, placement=None):
        rng = np.random.default_rng(seed)
        self.ranks, self.hidden, self.experts, self.top_k = ranks, hidden, experts, top_k
        owners = np.repeat(np.arange(ranks), experts // ranks) if placement is None else np.array(placement)
        self.owners = owners
        self.local = np.array([np.sum(owners[:expert] == owners[expert]) for expert in range(experts)])
        self.tokens = [int(rng.integers(0, most + 1)) for _ in range(ranks)]
        self.tokens[seed % ranks] = 0 if seed % 2 else most
        self.x = [rng.normal(size=(tokens, hidden)).astype(dtype) for tokens in self.tokens]
        choice = lambda: rng.permutation(experts)[:top_k] if experts >= top_k else rng.integers(0, experts, top_k)  # noqa: E731
        self.topk_idx = [np.array([choice() for _ in range(t)], np.int64).reshape(t, top_k) for t in self.tokens]
        for indices in self.topk_idx:
            indices[rng.random(indices.shape) < 0.2] = -1
        self.weights = [rng.random((tokens, top_k)).astype(np.float32) for tokens in self.tokens]

    def goes(self, source, rank):
        """Which tokens of a source go to a rank."""
        indices = self.topk_idx[source]
        return ((indices >= 0) & (self.owners[indices] == rank)).any(axis=1)

    def arrives(self, rank):
        """(source, token) of each row at a rank."""
        return [(s, int(t)) for s in range(self.ranks) for t in np.flatnonzero(self.goes(s, rank))]

    def rebased(self, rank):
        rows = [self.topk_idx[s][t] for s, t in self.arrives(rank)]
        rows = np.array(rows, np.int64).reshape(len(rows), self.top_k)
        return np.where((rows >= 0) & (self.owners[rows] == rank), self.local[rows], -1)


@pytest.mark.parametrize("seed", range(6))
def test_dispatch_and_combine_are_what_numpy_says(seed):
    ranks = [1, 2, 3, 4, 4, 2][seed]
    placement = [0, 1, 1, 3, 3, 3, 2, 0, 0, 0, 0, 2] if seed == 4 else None
    inputs = Inputs(seed, ranks, hidden=24, experts=12, top_k=[1, 4, 3, 2, 5, 12][seed], placement=placement)
    bias = [np.random.default_rng(9 + r).normal(size=x.shape).astype(np.float32) for r, x in enumerate(inputs.x)]

    def main(rank):
        me = rank.rank
        with ep.Buffer(rank, 24, 12, dtype="float32", capacity=16, placement=placement) as buffer:
            assert buffer.local_experts == [e for e in range(12) if inputs.owners[e] == me] and buffer.masked == []
            layout = buffer.layout(inputs.topk_idx[me])
            goes = np.stack([inputs.goes(me, r) for r in range(ranks)], axis=1)
            np.testing.assert_array_equal(layout.is_token_in_rank, goes)
            np.testing.assert_array_equal(layout.tokens_per_rank, goes.sum(axis=0))
            counts = [(inputs.topk_idx[me] == expert).sum() for expert in range(12)]
            np.testing.assert_array_equal(layout.tokens_per_expert, counts)

            x, indices, weights = inputs.x[me], inputs.topk_idx[me], inputs.weights[me]
            sent = buffer.dispatch(x, indices, topk_weights=weights, layout=layout, expert_alignment=4)
            rows = inputs.arrives(me)
            expected = np.array([inputs.x[s][t] for s, t in rows], np.float32).reshape(-1, 24)
            np.testing.assert_array_equal(sent.x, expected)
            np.testing.assert_array_equal(sent.topk_idx, inputs.rebased(me))
            theirs = np.array([inputs.weights[s][t] for s, t in rows], np.float32).reshape(-1, inputs.top_k)
            np.testing.assert_array_equal(sent.topk_weights, np.where(inputs.rebased(me) >= 0, theirs, 0))
            mine = [sum((inputs.topk_idx[s] == e).sum() for s in range(ranks)) for e in buffer.local_experts]
            assert sent.tokens_per_expert == [-(-count // 4) * 4 for count in mine] and sent.scales is None
            prefix = np.cumsum([[inputs.goes(s, r).sum() for r in range(ranks)] for s in range(ranks)], axis=0)
            np.testing.assert_array_equal(sent.handle.rank_prefix, prefix)
            np.testing.assert_array_equal(sent.handle.source_tokens, [t for _, t in rows])
            np.testing.assert_array_equal(sent.handle.is_token_in_rank, goes)
            assert (sent.handle.rows, sent.handle.tokens) == (len(rows), len(x))

            again, none = buffer.dispatch_cached(-x, sent.handle)
            np.testing.assert_array_equal(again, -expected)
            assert none is None
            by_ranks = buffer.layout_of_ranks(goes, np.array(counts, np.int32))
            plain = buffer.dispatch(x, layout=by_ranks)
            np.testing.assert_array_equal(plain.x, expected)
            assert plain.topk_idx is None and plain.tokens_per_expert == mine

            scaled = sent.x * np.float32(me + 1)
            combined = buffer.combine(scaled, sent.handle, topk_weights=sent.topk_weights, bias=(bias[me], bias[me]))
            total, weight_sum = np.zeros_like(x), np.zeros_like(weights)
            for r in range(ranks):
                total = np.where(goes[:, r : r + 1], total + x * np.float32(r + 1), total)
                weight_sum += np.where((indices >= 0) & (inputs.owners[indices] == r), weights, 0)
            np.testing.assert_array_equal(combined.x, total + bias[me] + bias[me])
            np.testing.assert_array_equal(combined.topk_weights, weight_sum)
            parts = buffer.combine(np.stack([scaled, scaled], axis=1), sent.handle)
            np.testing.assert_array_equal(parts.x, 2 * total)
            assert parts.topk_weights is None

            worst = buffer.dispatch(x, indices, topk_weights=weights, worst_tokens=len(rows) + 5)
            assert worst.x.shape == (len(rows) + 5, 24) and worst.tokens_per_expert == []
            np.testing.assert_array_equal(worst.topk_idx[-5:], -1)
            np.testing.assert_array_equal(worst.topk_weights[-5:], 0)
            np.testing.assert_array_equal(worst.handle.source_tokens[-5:], -1)

    unisono.on_threads(ranks, main)


@pytest.mark.parametrize("scales", ["rows", "columns", "padded columns", "integers"])
def test_eight_bits_travel_with_scales_of_any_strides(scales):
    inputs = Inputs(3, 2, hidden=256, experts=4, top_k=2, dtype=np.float32)

    def scales_of(rank):
        tokens = inputs.tokens[rank]
        rows = np.random.default_rng(rank).random((tokens, 2)).astype(np.float32)
        if scales == "columns":
            return np.asfortranarray(rows)
        if scales == "padded columns":
            wide = np.full((2, tokens + 3), np.nan, np.float32)
            wide[:, :tokens] = rows.T
            return wide.T[:tokens]
        return rows.view(np.int32) if scales == "integers" else rows

    def main(rank):
        me = rank.rank
        with ep.Buffer(rank, 256, 4, capacity=8) as buffer:
            x = inputs.x[me].astype(FP8)
            sent = buffer.dispatch(x, inputs.topk_idx[me], scales=scales_of(me))
            assert sent.x.dtype == FP8 and sent.scales.flags.c_contiguous
            rows = inputs.arrives(me)
            np.testing.assert_array_equal(sent.x, np.array([inputs.x[s][t].astype(FP8) for s, t in rows]))
            expected = [scales_of(s)[t] for s, t in rows]
            np.testing.assert_array_equal(sent.scales, np.array(expected, sent.scales.dtype))
            again, scales_again = buffer.dispatch_cached(x.view(np.uint8), sent.handle, scales=scales_of(me))
            np.testing.assert_array_equal(again.view(np.uint8), sent.x.view(np.uint8))
            np.testing.assert_array_equal(scales_again, sent.scales)

    unisono.on_threads(2, main)


@pytest.mark.parametrize("cast", [None, "float32", "power_of_two", "ue8m0"])
def test_low_latency_is_what_numpy_says(cast):
    capacity, hidden, experts = 8, 512, 6
    inputs = Inputs(5, 2, hidden, experts, top_k=3, most=capacity, dtype=np.float32)
    inputs.x = [x.astype(BF16) for x in inputs.x]

    def cast_rows(row):
        blocks = row.astype(np.float32).reshape(-1, 128)
        amax = np.maximum(np.abs(blocks).max(axis=1), np.float32(1e-4))
        scale, inverse = amax / np.float32(448), np.float32(448) / amax
        if cast != "float32":
            scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
            inverse = 1 / scale
        return (blocks * inverse[:, None]).astype(FP8).reshape(-1), scale

    def main(rank):
        me, n = rank.rank, rank.world_size
        with ep.Buffer(rank, hidden, experts, capacity=capacity, top_k=3, low_latency=True) as buffer:
            x, indices, weights = inputs.x[me], inputs.topk_idx[me], inputs.weights[me]
            got = buffer.low_latency_dispatch(x, indices, cast=cast)
            assert got.x.shape == (experts // n, n * capacity, hidden) and got.x.dtype == (FP8 if cast else BF16)
            assert got.waited.shape == (n,) and got.waited[me] == 0
            ranges = got.handle.layout_range
            results = np.zeros(got.x.shape, BF16)
            for at, expert in enumerate(buffer.local_experts):
                rows = [(s, t) for s in range(n) for t in range(inputs.tokens[s]) if expert in inputs.topk_idx[s][t]]
                assert got.counts[at] == len(rows)
                assert got.handle.source_tokens[at, : len(rows)].tolist() == [t for _, t in rows]
                for s in range(n):
                    begin, count = int(ranges[at, s]) >> 32, int(ranges[at, s]) & 0xFFFFFFFF
                    assert rows[begin : begin + count] == [row for row in rows if row[0] == s]
                for place, (s, t) in enumerate(rows):
                    if cast is None:
                        np.testing.assert_array_equal(got.x[at, place], inputs.x[s][t])
                        values = got.x[at, place].astype(np.float32)
                    else:
                        codes, scale = cast_rows(inputs.x[s][t])
                        np.testing.assert_array_equal(got.x[at, place].view(np.uint8), codes.view(np.uint8))
                        if cast == "ue8m0":
                            packed = got.scales[at, :, place]
                            np.testing.assert_array_equal(packed.view(np.uint8), scale.view(np.uint32) >> 23)
                        else:
                            np.testing.assert_array_equal(got.scales[at, :, place], scale)
                        values = codes.astype(np.float32) * np.repeat(scale, 128)
                    results[at, place] = values * (expert + 1)

            def expected(token):
                total = np.zeros(hidden, np.float32)
                for r in range(n):
                    part = np.zeros(hidden, np.float32)
                    for k, expert in enumerate(indices[token]):
                        if expert >= 0 and inputs.owners[expert] == r:
                            row = x[token].astype(np.float32)
                            if cast is not None:
                                codes, scale = cast_rows(x[token])
                                row = codes.astype(np.float32) * np.repeat(scale, 128)
                            part += weights[token, k] * (row * (expert + 1)).astype(BF16).astype(np.float32)
                    total += part.astype(BF16).astype(np.float32)
                return total.astype(BF16)

            combined = buffer.low_latency_combine(results, indices, weights, got.handle)
            assert combined.x.dtype == BF16 and combined.x.shape == x.shape
            for token in range(len(x)):
                np.testing.assert_array_equal(combined.x[token], expected(token))
            buffer.combine_buffer().numpy()[:] = results
            sent = buffer.low_latency_combine_send(None, indices, weights, got.handle)
            np.testing.assert_array_equal(sent.receive().x, combined.x)
            with pytest.raises(errors.ArgumentError, match="that was not received, got one that was"):
                sent.receive()
            quantised = buffer.low_latency_combine(results, indices, weights, got.handle, quantised=True)
            close = np.abs(quantised.x.astype(np.float32) - combined.x.astype(np.float32))
            assert close.max(initial=0) <= 0.1 * max(1, np.abs(combined.x.astype(np.float32)).max(initial=0))

    unisono.on_threads(2, main)


def test_halves_overlap_and_are_received_in_order():
    def main(rank):
        with ep.Buffer(rank, 8, 2, dtype="float32", capacity=4, low_latency=True) as buffer:
            sent = [
                buffer.low_latency_dispatch_send(np.full((1, 8), value, np.float32), np.array([[rank.rank]]))
                for value in (1, 2)
            ]
            with pytest.raises(errors.ArgumentError, match="fewer than 2 that are sent and not received"):
                buffer.low_latency_dispatch_send(np.ones((1, 8), np.float32), np.array([[0]]))
            with pytest.raises(errors.ArgumentError, match="the first of this buffer that is not received"):
                sent[1].receive()
            first = sent[0].receive()
            return first.x[0, 0, 0].item()

    assert unisono.on_threads(2, main) == [1.0, 1.0]


def test_outputs_own_their_memory_and_never_alias():
    def main(rank):
        with ep.Buffer(rank, 8, 2, capacity=4, low_latency=True) as buffer:
            x = np.ones((2, 8), BF16)
            outputs = [buffer.dispatch(x * BF16(k), np.array([[0], [1]])).x for k in range(1, 4)]
            lent = buffer.combine_buffer("bfloat16")
            lent.numpy()[:] = 7
            with pytest.raises(errors.ArgumentError, match="dtype should be bf16, as before, got f16"):
                buffer.combine_buffer("float16")
        del buffer
        gc.collect()
        assert [output.astype(float).sum() for output in outputs] == [16.0, 32.0, 48.0]
        outputs[0][:] = 5
        assert outputs[1].astype(float).sum() == 32.0
        assert (lent.numpy().astype(float) == 7).all()  # a view of the host keeps its memory

    unisono.on_threads(2, main)


def test_tokens_may_be_unsigned_integers_where_a_framework_has_no_such_type():
    program = """if True:
        import sys
        sys.modules["ml_dtypes"] = None  # it is not there
        import numpy as np, unisono
        with unisono.ep.Buffer(unisono.Communicator.threads(1)[0], 8, experts=1) as buffer:
            x = np.full((3, 8), 0x3f80, np.uint16)
            sent = buffer.dispatch(x, np.zeros((3, 1), np.int64))
            assert sent.x.dtype == np.uint16 and (sent.x == x).all()
            assert buffer.combine(sent.x, sent.handle).x.tolist() == x.tolist()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


REFUSED = {
    "hidden": (lambda b, x, i: b.dispatch(x[:, :4].copy(), i), "dispatch", "x", "of shape [any, 8]", "[2, 4]"),
    "dimensions": (lambda b, x, i: b.dispatch(x[0], i), "dispatch", "x", "of shape [any, 8]", "[8]"),
    "list": (lambda b, x, i: b.dispatch([1.0], i), "dispatch", "x", "an array with a shape", "list"),
    "type": (lambda b, x, i: b.dispatch(x.astype(float), i), "dispatch", "dtype", "bf16, f16, f32 or f8e4m3", "f64"),
    "gaps": (lambda b, x, i: b.dispatch(np.zeros((2, 16), np.float32)[:, ::2], i), "dispatch", "x", "contiguous", "strides"),
    "indices": (lambda b, x, i: b.dispatch(x, i.astype(np.int32)), "dispatch", "topk_idx", "i64", "i32"),
    "tokens": (lambda b, x, i: b.dispatch(x, i[:1]), "dispatch", "topk_idx", "of shape [2, any]", "[1, 1]"),
    "expert": (lambda b, x, i: b.dispatch(x, i + 9), "dispatch", "topk_idx", "−1, or below 2 experts", "9 for token 0"),
    "top-k": (lambda b, x, i: b.layout(np.zeros((2, 5), np.int64)), "layout", "top_k", "1 to 4", "5"),
    "neither": (lambda b, x, i: b.dispatch(x), "dispatch", "topk_idx", "indices or a layout", "neither"),
    "weights": (lambda b, x, i: b.dispatch(x, i, topk_weights=x), "dispatch", "topk_weights", "2 of f32", "16 of f32"),
    "scales": (lambda b, x, i: b.dispatch(x, i, scales=x[:1]), "dispatch", "scales", "those of 2 tokens", "1"),
    "a scale": (lambda b, x, i: b.dispatch(x, i, scales=x[:, 0]), "dispatch", "scales", "of two dimensions", "[2]"),
    "too many": (
        lambda b, x, i: b.low_latency_dispatch(np.zeros((5, 8), np.float32), np.zeros((5, 1), np.int64)),
        "low_latency_dispatch", "tokens", "at most 4, the capacity", "5",
    ),
    "cast": (lambda b, x, i: b.low_latency_dispatch(x, i, cast="f8"), "low_latency_dispatch", "cast", '"ue8m0"', "f8"),
    "unpacked": (lambda b, x, i: b.low_latency_dispatch(x, i, cast="ue8m0"), "low_latency_dispatch", "hidden", "512", "8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_the_buffer_still_works(case):
    use, call, what, expected, got = REFUSED[case]

    def main(rank):
        with ep.Buffer(rank, 8, 2, dtype="float32", capacity=4, top_k=4, low_latency=True) as buffer:
            x, indices = np.ones((2, 8), np.float32), np.zeros((2, 1), np.int64)
            with pytest.raises(errors.ArgumentError) as caught:
                use(buffer, x, indices)
            error = caught.value
            assert (error.rank, error.call, error.what) == (rank.rank, call, what)
            assert expected in error.expected and got in error.got, (error.expected, error.got)
            return buffer.combine((sent := buffer.dispatch(x, indices)).x, sent.handle).x.sum().item()

    assert unisono.on_threads(2, main) == [16.0] * 2


def test_the_life_of_a_buffer():
    def main(rank):
        buffer = ep.Buffer(rank, 8, 3)
        with pytest.raises(errors.BufferStateError, match="that all ranks have exchanged; this one is only constructed") as caught:
            buffer.layout(np.zeros((1, 1), np.int64))
        assert (caught.value.rank, caught.value.call) == (rank.rank, "layout") and not buffer.is_available
        buffer.exchange()
        with pytest.raises(errors.BufferStateError, match="is available already"):
            buffer.exchange()
        assert buffer.is_available
        buffer.close()
        for call in (buffer.close, buffer.exchange, lambda: buffer.masked, lambda: buffer.layout(np.zeros((1, 1), np.int64))):
            with pytest.raises(errors.ClosedError, match=f"on rank {rank.rank}: the buffer is closed"):
                call()
        assert not buffer.is_available
        with pytest.raises(errors.BufferSettingsError) as caught:
            ep.Buffer(rank, 8 + 8 * (rank.rank == 2), 6).exchange()
        assert (caught.value.what, caught.value.rank, caught.value.expected, caught.value.got) == ("hidden", 2, "8", "16")
        for wrong, what in [({"hidden": 12}, "hidden"), ({"experts": 7}, "placement"), ({"dtype": "int8"}, "dtype"), ({"top_k": 40}, "top_k")]:
            with pytest.raises(errors.ArgumentError) as caught:
                ep.Buffer(rank, **{"hidden": 8, "experts": 6, **wrong})
            assert caught.value.what == what and isinstance(caught.value, ValueError)
        with pytest.raises(TypeError, match="there is no option `size`"):
            ep.Buffer(rank, 8, 6, size=3)

    unisono.on_threads(3, main)


def test_ranks_that_call_otherwise_are_told_both_calls():
    def main(rank):
        buffer = ep.Buffer(rank, 8, 2, dtype="float32")
        buffer.exchange()
        with pytest.raises(errors.MismatchError) as caught:
            buffer.dispatch(np.ones((1, 8), np.float32), np.zeros((1, 1 + rank.rank), np.int64))
            buffer.dispatch(np.ones((1, 8), np.float32), np.zeros((1, 1), np.int64))
        return sorted([caught.value.expected, caught.value.got])

    first, second = unisono.on_threads(2, main)
    assert first == second and "top-1" in first[0] and "top-2" in first[1]


def test_a_masked_rank_is_left_out_and_the_others_go_on():
    def main(rank):
        buffer = ep.Buffer(rank, 8, 3, dtype="float32", masking=True)
        buffer.exchange()
        x, indices = np.ones((3, 8), np.float32), np.array([[0], [1], [2]])
        assert buffer.dispatch(x, indices).x.shape == (3, 8)
        rank.barrier()
        if rank.rank == 0:
            buffer.mask_rank(2)
        if rank.rank == 2:
            try:
                while True:
                    buffer.dispatch(x, indices)
            except errors.GivenUpError as error:
                return error.how
        rows = [len(buffer.dispatch(x, indices).x) for _ in range(3)]
        return buffer.masked, rows[-1]

    assert unisono.on_threads(3, main) == [([2], 2), ([2], 2), "its ep::Buffer was left out by them"]


def test_a_masked_rank_is_taken_in_by_a_new_buffer():
    def main(rank):
        buffer = ep.Buffer(rank, 8, 3, dtype="float32", masking=True)
        with pytest.raises(errors.BufferStateError):
            buffer.renew()
        buffer.exchange()
        x, indices = np.ones((3, 8), np.float32), np.array([[0], [1], [2]])
        if rank.rank == 0:
            buffer.mask_rank(2)
        rank.barrier()
        if rank.rank == 2:
            with pytest.raises(errors.GivenUpError):
                buffer.dispatch(x, indices)
        else:
            assert buffer.dispatch(x, indices).x.shape == (2, 8)
        with buffer.renew() as renewed:
            assert (buffer.masked, renewed.masked, renewed.is_available) == ([2], [], True)
            buffer.close()
            for call in (buffer.renew, lambda: buffer.masked):
                with pytest.raises(errors.ClosedError):
                    call()
            return len(renewed.dispatch(x, indices).x)

    assert unisono.on_threads(3, main) == [3, 3, 3]


def test_a_wait_ends_by_ctrl_c_and_the_interpreter_is_free_meanwhile():
    program = """if True:
        import os, signal, threading, time
        import numpy as np, unisono
        ranks = unisono.Communicator.threads(2)
        buffers = [unisono.ep.Buffer(rank, 8, 2, dtype="float32") for rank in ranks]
        other = threading.Thread(target=buffers[1].exchange)
        other.start(); buffers[0].exchange(); other.join()
        ticks = []
        threading.Thread(target=lambda: [ticks.append(time.sleep(0.02)) for _ in range(10)]).start()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begun = time.monotonic()
        try:
            buffers[0].dispatch(np.ones((1, 8), np.float32), np.array([[0]]))
        except KeyboardInterrupt:
            assert len(ticks) == 10 and time.monotonic() - begun < 10
            try:
                buffers[1].dispatch(np.ones((1, 8), np.float32), np.array([[0]]))
            except unisono.errors.AbortedError as error:
                print("told:", error.rank, error.reason)
    """
    # A shell gives SIGINT as ignored to what it runs in the background.
    done = subprocess.run(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "told: 0 a signal ended its wait with KeyboardInterrupt\n", done.stdout + done.stderr


def test_two_threads_share_a_buffer():
    with ep.Buffer(unisono.Communicator.threads(1)[0], 8, 2, dtype="float32") as buffer:
        def many(value):
            for _ in range(200):
                sent = buffer.dispatch(np.full((3, 8), value, np.float32), np.array([[0], [1], [-1]]))
                assert sent.x.shape == (2, 8) and (sent.x == value).all()
                done.append(value)

        done: list[float] = []
        threads = [threading.Thread(target=many, args=(value,)) for value in (1.0, 2.0)]
        [thread.start() for thread in threads]
        begun = time.monotonic()
        [thread.join() for thread in threads]
        assert len(done) == 400 and time.monotonic() - begun < 30
