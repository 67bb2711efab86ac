"""Windows: collectives where memory lies, found by the addresses of arrays; their life, and what is refused."""

from __future__ import annotations

import gc
import re

import ml_dtypes
import numpy as np
import pytest

import unisono
from unisono import errors


@pytest.mark.parametrize("memory", [None, "host", "pinned"])
def test_collectives_work_on_windows_where_they_lie(memory):
    count = 300_000

    def main(rank):
        me, n = rank.rank, rank.world_size
        with rank.window((3, count), "float32", memory=memory) as window:
            assert window.shape == (3, count) and window.dtype == "float32" and window.id == 1
            x = window.lend().numpy()
            assert x.ctypes.data == window.address and not x.any()
            x[:] = np.arange(3)[:, None] + me
            assert rank.all_reduce(x[1]) is not None
            told = re.search(r"latest: .*takes ([\w-]+)", rank.explain())[1]
            outside = np.full(count, 1.0 + me, np.float32)
            rank.all_reduce(outside)
            staged = re.search(r"latest: .*takes ([\w-]+)", rank.explain())[1]
            np.testing.assert_array_equal(x[1], outside)
            assert (x[0] == me).all() and (x[2] == 2 + me).all()
            rank.all_reduce(window)  # the whole of it
            assert (x[0] == sum(range(n))).all() and (x[2] == sum(2 + r for r in range(n))).all()
            rank.broadcast(x[2, 5:10], 1)
            part = rank.all_gather(x[0, :7], out=np.zeros((n, 7), np.float32))
            assert (part == sum(range(n))).all()
            work = rank.all_reduce(x[0], async_op=True)
            work.wait()
            assert (x[0] == n * sum(range(n))).all()
            return told, staged

    assert unisono.on_threads(3, main) == [("direct", "two-shot")] * 3


@pytest.mark.parametrize("dtype", ["bool", "int64", "complex128", ml_dtypes.bfloat16])
def test_windows_of_every_type_are_views(dtype):
    with unisono.Communicator.threads(1)[0] as rank:
        window = rank.window((2, 3), dtype)
        assert isinstance(window, unisono.View) and window.numpy().dtype.name == window.dtype
        if dtype != ml_dtypes.bfloat16:
            assert np.from_dlpack(window).shape == (2, 3)
        rank.broadcast(window)
        window.close()


def test_the_life_of_a_window():
    def main(rank):
        window = rank.window(100, "int32")
        x = window.numpy()
        x[:] = rank.rank
        window.close()
        gc.collect()
        assert (x == rank.rank).all()  # an array keeps its memory
        for call in (window.close, window.lend):
            with pytest.raises(errors.ClosedError, match=f"on rank {rank.rank}: the window is closed"):
                call()
        assert rank.all_reduce(x).sum() == 100 * sum(range(rank.world_size))  # an array like any other now
        dropped = rank.window(1000)
        y = dropped.numpy()
        y[:] = 1
        del dropped
        gc.collect()
        return rank.all_reduce(y)[0].item(), rank.window(10).id

    assert unisono.on_threads(2, main) == [(2.0, 3)] * 2


def test_a_call_on_a_window_is_one_on_all_ranks():
    def main(rank):
        window = rank.window(100_000)
        x = window.numpy() if rank.rank else np.zeros(100_000, np.float32)
        try:
            rank.all_reduce(x)
            rank.barrier()
        except errors.MismatchError as error:
            with pytest.raises(errors.PoisonedError):
                window.lend()
            return sorted([error.expected, error.got])
        return None

    first, second = unisono.on_threads(2, main)
    assert first == second, (first, second)


def test_what_does_not_fit_is_refused():
    with unisono.Communicator.threads(1)[0] as rank:
        for call, what in [
            (lambda: rank.window(3, "float31"), "dtype"),
            (lambda: rank.window((2**40, 2**40)), "shape"),
            (lambda: rank.window(3, memory="device"), "memory"),
            (lambda: rank.window(3, memory="disk"), "memory"),
            (lambda: rank.symmetric_memory(3, memory="pinned"), "memory"),
            (lambda: rank.register([1.0]), "x"),
        ]:
            with pytest.raises(errors.ArgumentError) as caught:
                call()
            assert caught.value.what == what
        with pytest.raises(errors.PlaceError) as caught:
            rank.register(np.zeros(4))
        assert (caught.value.call, caught.value.got) == ("register", "host memory")
        rank.barrier()

    def main(rank):
        with pytest.raises(errors.MismatchError):
            rank.window(100 + rank.rank, "uint8")

    unisono.on_threads(2, main)
