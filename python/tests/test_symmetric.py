"""Symmetric memory: views, signals, and what becomes of both."""

from __future__ import annotations

import gc
import time

import ml_dtypes
import numpy as np
import pytest

import unisono
from unisono import errors


def test_peers_read_and_write_each_other_and_signals_bring_order():
    def main(rank):
        me, n = rank.rank, rank.world_size
        memory = unisono.SymmetricMemory.empty(rank, (n, 5), "int64")
        assert (memory.shape, memory.dtype) == ((n, 5), "int64")
        assert not memory.local.numpy().any()
        rank.barrier()
        for peer in range(n):
            memory.view(peer).numpy()[me] = 10 * me + peer
            memory.signal(peer, me, 1)
        for peer in range(n):
            memory.wait_signal(peer, 1, timeout=30)
        np.testing.assert_array_equal(memory.local.numpy(), [[10 * peer + me] * 5 for peer in range(n)])
        assert [memory.signal_value(slot) for slot in range(n + 1)] == [1] * n + [0]
        assert memory.addresses == [memory.address(peer) for peer in range(n)]
        assert memory.addresses[me] == memory.local.address == memory.local.numpy().ctypes.data
        memory.barrier()
        mine = memory.local.numpy()
        memory.close()
        gc.collect()
        assert mine[0, 0] == me  # a view keeps its memory
        for call in (lambda: memory.local, lambda: memory.signal(0, 0, 1), lambda: memory.close()):
            with pytest.raises(errors.ClosedError, match=f"on rank {me}: the symmetric memory is closed"):
                call()

    unisono.on_threads(3, main)


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("bool"), "complex128", ml_dtypes.bfloat16, "float8_e5m2", "f16"])
def test_memory_of_every_type(dtype):
    with unisono.Communicator.threads(1)[0] as rank:
        view = rank.symmetric_memory((2, 3), dtype).local
        array = view.numpy()
        assert array.shape == (2, 3) and array.dtype.name == view.dtype
        array[1, 2] = 1
        assert view.numpy()[1, 2] == 1 and array.astype(complex).sum() == 1


def test_views_go_to_other_frameworks_by_dlpack():
    with unisono.Communicator.threads(1)[0] as rank:
        memory = rank.symmetric_memory((2, 3), "float32")
        array = np.from_dlpack(memory.local)
        array[:] = 7
        assert memory.local.numpy().tolist() == [[7.0] * 3] * 2
        assert memory.local.__dlpack_device__() == (1, 0)
        for options in ({}, {"max_version": (1, 0)}, {"max_version": (0, 8)}):
            capsule = memory.local.__dlpack__(**options)
            assert ("versioned" in repr(capsule)) == (options == {"max_version": (1, 0)})
            del capsule  # nobody took it
        with pytest.raises(BufferError):
            memory.local.__dlpack__(copy=True)
        with pytest.raises(BufferError):
            memory.local.__dlpack__(dl_device=(2, 0))
        assert not hasattr(memory.local, "__cuda_array_interface__")
        for name in ("float32", "bfloat16", "float8_e4m3fn"):  # numpy's interface has no name for the last two
            view = rank.symmetric_memory(3, name).local
            view.numpy()[:] = 2
            assert rank.broadcast(view) is view and view.numpy().astype(float).tolist() == [2.0] * 3


def test_a_signal_that_does_not_come_is_a_timeout_and_all_goes_on():
    with unisono.Communicator.threads(1)[0] as rank:
        memory = rank.symmetric_memory(1)
        begun = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            memory.wait_signal(3, 5, timeout=0.15)
        error = caught.value
        assert isinstance(error, errors.SignalError)
        assert (error.rank, error.slot, error.expected, error.got) == (0, 3, 5, 0)
        assert 0.15 <= time.monotonic() - begun < 5 and error.waited >= 0.15
        memory.signal(0, 3, 5)
        memory.wait_signal(3, 5)


def test_what_does_not_fit_is_refused():
    with unisono.Communicator.threads(1)[0] as rank:
        memory = rank.symmetric_memory(4)
        cases = [
            (lambda: memory.view(1), "peer"),
            (lambda: memory.signal(1, 0, 1), "peer"),
            (lambda: memory.signal(0, 64, 1), "slot"),
            (lambda: memory.wait_signal(64, 1), "slot"),
            (lambda: rank.symmetric_memory(3, "float31"), "dtype"),
            (lambda: rank.symmetric_memory((2**40, 2**40)), "shape"),
            (lambda: rank.symmetric_memory(3, memory="device"), "memory"),
            (lambda: rank.symmetric_memory(3, memory="disk"), "memory"),
        ]
        for call, what in cases:
            with pytest.raises(errors.ArgumentError) as caught:
                call()
            assert caught.value.what == what
        rank.barrier()


def test_ranks_that_ask_for_other_memory_are_told():
    def main(rank):
        with pytest.raises(errors.MismatchError, match="f32.*f64|f64.*f32"):
            rank.symmetric_memory(3, "float32" if rank.rank else "float64")

    unisono.on_threads(2, main)
