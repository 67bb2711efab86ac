"""Arrays of all kinds, types and places: what goes, and what is refused with nothing written."""

from __future__ import annotations

import array
import ctypes
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import unisono
from unisono import errors

DTYPES = [
    "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
]  # fmt: skip


class OnlyDlpack:
    """An array that nothing but DLPack reaches; `version` is what its producer knows."""

    def __init__(self, inner, version=1):
        self.inner, self.version = inner, version

    def __dlpack_device__(self):
        return self.inner.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **options):
        if self.version == 0 and options:
            raise TypeError("max_version is not known")
        return self.inner.__dlpack__(stream=stream, **options)


class OnlyInterface:
    """An array that nothing but the array interface reaches."""

    def __init__(self, inner):
        self.__array_interface__ = inner.__array_interface__
        self.inner = inner


@pytest.fixture
def alone():
    with unisono.Communicator.threads(1)[0] as rank:
        yield rank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_summed(dtype):
    inputs = [np.array([1, 2, 3 + rank]).astype(dtype) for rank in range(2)]
    results = unisono.on_threads(2, lambda rank: rank.all_reduce(inputs[rank.rank].copy()))
    for result in results:
        assert result.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(result.astype(complex), [2, 4, 7])


def test_booleans_travel():
    results = unisono.on_threads(2, lambda rank: rank.broadcast(np.array([rank.rank == 1, False]), 1).tolist())
    assert results == [[True, False], [True, False]]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.reshape(2, 2),
        lambda x: memoryview(x),
        lambda x: bytearray(x.tobytes()),
        lambda x: array.array("d", x),
        lambda x: (ctypes.c_double * 4)(*x),
        lambda x: OnlyDlpack(x),
        lambda x: OnlyDlpack(x, version=0),
        lambda x: OnlyInterface(x),
    ],
    ids=["numpy", "matrix", "memoryview", "bytearray", "array", "ctypes", "dlpack", "old dlpack", "interface"],
)
def test_memory_is_reached_by_every_protocol(make):
    def main(rank):
        x = make(np.array([1.0, 2.0, 3.0, 4.0]) * (rank.rank + 1))
        result = rank.broadcast(x, 1)
        assert result is x
        inner = getattr(x, "inner", x)
        return np.frombuffer(memoryview(inner).cast("B"), dtype=float).tolist()

    assert unisono.on_threads(2, main) == [[2.0, 4.0, 6.0, 8.0]] * 2


def test_a_scalar_array_and_an_empty_one(alone):
    assert alone.all_reduce(np.array(5.0)) == 5.0
    assert alone.all_reduce(np.zeros((0, 3))).shape == (0, 3)


def test_memory_that_is_lent_is_given_back(alone):
    x = bytearray(8)
    alone.all_reduce(x)
    x.extend(b"more")  # refused while somebody has a view
    with pytest.raises(errors.ArgumentError):
        alone.all_reduce(memoryview(x)[::2])
    x.extend(b"more")


def test_an_operation_in_flight_keeps_its_array():
    def main(rank):
        x = bytearray(8)
        work = rank.all_reduce(x, async_op=True)
        if not work.is_completed():
            with pytest.raises(BufferError):
                x.extend(b"more")
        rank.barrier()
        work.wait()
        x.extend(b"more")

    unisono.on_threads(2, main)


class Described:
    """An array that describes itself, rightly or not."""

    def __init__(self, **interface):
        self.__array_interface__ = {"typestr": "<f4", "shape": (2,), "data": (4096, False), **interface}


REFUSED = {
    "a negative shape": (lambda: Described(shape=(-3,)), "of a shape that memory can have", "[-3]"),
    "a shape beyond memory": (lambda: Described(shape=(2**40, 2**40)), "of a shape that memory can have", "[1099511627776, "),
    "other strides than dimensions": (lambda: Described(strides=(4, 4)), "contiguous", "strides of [4, 4] bytes"),
    "another typestr": (lambda: Described(typestr="<V3"), "of one of the types", "<V3"),
    "gaps": (lambda: np.zeros((4, 4))[:, ::2], "contiguous (in the order of C)", "strides of [32, 16] bytes"),
    "order of Fortran": (lambda: np.asfortranarray(np.zeros((2, 3))), "contiguous", "strides of [8, 16] bytes"),
    "dates": (lambda: np.zeros(2, dtype="datetime64[s]"), "of one of the types", "datetime64[s]"),
    "text": (lambda: np.array(["a"]), "of one of the types", "<U1"),
    "byte order": (lambda: np.zeros(2, dtype=">f4"), "in this machine's byte order", ">f"),
    "a structure": (lambda: np.zeros(2, dtype="f4,i4"), "of one of the types", "f"),
    "another fp8": (lambda: np.zeros(2, dtype=ml_dtypes.float8_e4m3b11fnuz), "of one of the types", "float8_e4m3b11fnuz"),
    "objects": (lambda: np.array([None]), "of one of the types", "object"),
    "a list": (lambda: [1.0, 2.0], "an array", "list"),
    "nothing": (lambda: None, "an array", "None"),
    "text of python": (lambda: "abc", "an array", "str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case):
    make, expected, got = REFUSED[case]

    def main(rank):
        good = np.ones(3)
        for manner in ({}, {"async_op": True}, {"out": np.zeros(3)}):
            with pytest.raises(errors.ArgumentError) as caught:
                rank.all_reduce(make(), **manner)
            error = caught.value
            assert isinstance(error, ValueError) and (error.rank, error.call, error.what) == (rank.rank, "all_reduce", "x")
            assert expected in error.expected and got in error.got, (error.expected, error.got)
            assert f"all_reduce on rank {rank.rank}: x should be" in str(error)
            assert not manner.get("out", np.zeros(1)).any()
        return rank.all_reduce(good).tolist()  # the communicator still works

    assert unisono.on_threads(2, main) == [[2.0] * 3] * 2


def test_a_read_only_array_is_refused_as_a_target_only():
    def main(rank):
        frozen = np.ones(2)
        frozen.flags.writeable = False
        for call in (lambda: rank.all_reduce(frozen), lambda: rank.all_reduce(np.ones(2), out=frozen)):
            with pytest.raises(errors.ArgumentError, match=f"on rank {rank.rank}: .* should be writable, got a read-only"):
                call()
        with pytest.raises(errors.ArgumentError, match="read-only"):
            rank.recv(b"bytes", 1 - rank.rank)
        assert frozen.tolist() == [1.0, 1.0]
        data = b"abc" if rank.rank == 0 else bytearray(3)
        rank.broadcast(data, 0)  # the root's own is only read
        return rank.all_reduce(frozen, out=np.zeros(2)).tolist(), bytes(data)

    assert unisono.on_threads(2, main) == [([2.0, 2.0], b"abc")] * 2


class Tensor:
    """What is asked of tensors of torch."""

    is_sparse, is_cuda = False, False

    def __init__(self, array, device=-1, packed=True, conjugate=False):
        self.array, self.device, self.packed, self.conjugate = array, device, packed, conjugate
        self.is_cpu, self.is_cuda = device == -1, device >= 0
        self.dtype = DTYPES_OF_TORCH[str(array.dtype)]

    def is_contiguous(self):
        return self.packed

    def is_conj(self):
        return self.conjugate

    def stride(self):
        return (2,)

    def get_device(self):
        return self.device

    def numel(self):
        return self.array.size

    def data_ptr(self):
        return self.array.ctypes.data


class TorchDtype:
    def __init__(self, name):
        self.name = name

    def __str__(self):
        return f"torch.{self.name}"


DTYPES_OF_TORCH = {name: TorchDtype(name) for name in ("float32", "bfloat16", "complex64", "int64", "float8_e5m2", "uint4")}


def test_tensors_of_torch_go_by_their_own_methods(monkeypatch):
    torch = types.ModuleType("torch")
    torch.Tensor = Tensor
    monkeypatch.setitem(sys.modules, "torch", torch)

    def main(rank):
        for dtype in ("float32", ml_dtypes.bfloat16, "complex64", "int64", ml_dtypes.float8_e5m2):
            x = Tensor(np.array([1, 2, 3]).astype(dtype))
            assert rank.all_reduce(x) is x
            np.testing.assert_array_equal(x.array.astype(complex), [2, 4, 6])
        array = np.ones(3, np.float32)
        strange = Tensor(array)
        strange.dtype = DTYPES_OF_TORCH["uint4"]
        sparse, elsewhere = Tensor(array), Tensor(array)
        sparse.is_sparse, elsewhere.is_cpu = True, False
        for wrong, got in [
            (Tensor(array, packed=False), "strides of (2,) elements"),
            (Tensor(array.astype("complex64"), conjugate=True), "a conjugate that was not resolved"),
            (strange, "torch.uint4"),
            (sparse, "a sparse tensor"),
            (elsewhere, "a tensor on -1"),
        ]:
            with pytest.raises(errors.ArgumentError) as caught:
                rank.all_reduce(wrong)
            assert got in caught.value.got
        with pytest.raises(errors.PlaceError) as caught:
            rank.all_reduce(Tensor(array, device=3))
        assert (caught.value.expected, caught.value.got) == ("host memory", "cuda:3")
        assert array.tolist() == [1.0] * 3

    unisono.on_threads(2, main)


def test_a_read_only_dlpack_tensor_is_refused_as_a_target(alone):
    frozen = np.ones(2)
    frozen.flags.writeable = False
    with pytest.raises(errors.ArgumentError, match="read-only"):
        alone.all_reduce(OnlyDlpack(frozen))


def test_counts_and_types_must_fit_together(alone):
    out = np.zeros(2)
    with pytest.raises(errors.ArgumentError) as caught:
        alone.all_reduce(np.ones(3), out=out)
    assert (caught.value.expected, caught.value.got) == ("3", "2")
    with pytest.raises(errors.ArgumentError, match="dtype of the output should be f64, got f32"):
        alone.all_reduce(np.ones(2), out=out.astype("f4"))
    with pytest.raises(errors.ArgumentError, match="overlap|same memory|disjoint"):
        both = np.zeros(6)
        alone.all_reduce(both[:4], out=both[2:])
    assert not out.any()


def test_a_reduction_that_the_type_does_not_have_is_refused(alone):
    with pytest.raises(errors.UnsupportedError) as caught:
        alone.all_reduce(np.ones(2), "bit_and")
    assert (caught.value.op, caught.value.dtype) == ("bit_and", "f64") and isinstance(caught.value, ValueError)
    with pytest.raises(errors.UnknownNameError) as caught:
        alone.all_reduce(np.ones(2), "mean")
    assert caught.value.got == "mean"


def test_reductions_go_by_all_their_names():
    class ReduceOp:
        def __str__(self):
            return "RedOpType.PRODUCT"

    def main(rank):
        x = np.array([rank.rank + 2])
        names = ["sum", "SUM", "prod", ReduceOp(), "BAND", "bit_xor", "avg"]
        return [int(rank.all_reduce(x.copy(), name)[0]) for name in names] + [
            float(rank.all_reduce(np.ones(1), f"premul_sum:{rank.rank + 0.5}")[0])
        ]

    assert unisono.on_threads(2, main) == [[5, 5, 6, 6, 2, 1, 2, 2.0]] * 2


def test_arrays_of_other_devices_are_refused_by_name(alone):
    class OnGpu:
        __cuda_array_interface__ = {"typestr": "<f4", "shape": (4,), "data": (4096, False), "version": 3}

        def __dlpack_device__(self):
            return (2, 1)

    with pytest.raises(errors.PlaceError) as caught:
        alone.all_reduce(OnGpu(), stream=0)
    assert "cuda:1" in str(caught.value) and isinstance(caught.value, ValueError)
    with pytest.raises(errors.PlaceError):
        alone.all_reduce(OnGpu())


@pytest.mark.parametrize("stream", [(7,), (7, None, None), (7, "soon"), (None, 7), "soon"])
def test_streams_that_are_neither_one_nor_a_pair_are_refused(alone, stream):
    x = np.ones(3)
    with pytest.raises(errors.ArgumentError) as caught:
        alone.all_reduce(x, stream=stream)
    error = caught.value
    assert (error.rank, error.what, x.tolist()) == (0, "stream", [1, 1, 1])


def test_a_counted_part_that_has_no_room_names_both_ranks():
    def main(rank):
        send = np.array([1, 3] if rank.rank == 0 else [1, 1], dtype=np.uint32)
        out, receive = np.full(4, -1.0), np.zeros(2, dtype=np.int32)
        with pytest.raises(errors.CountsError) as caught:
            rank.all_to_all_counted(np.ones(4), out, send_counts=send, receive_counts=receive)
            rank.barrier()
        error = caught.value
        return error.source, error.to, error.got, error.expected, error.is_input

    assert unisono.on_threads(2, main) == [(0, 1, 3, 2, False)] * 2


def test_other_shapes_across_ranks_name_both_calls():
    def main(rank):
        with pytest.raises(errors.MismatchError) as caught:
            rank.all_reduce(np.ones(3 + rank.rank))
            rank.barrier()
        return sorted([caught.value.expected, caught.value.got])

    results = unisono.on_threads(2, main)
    assert results[0] == results[1]
    assert results[0][0].startswith("all_reduce #1 on rank 0 (f64, 3, sum)"), results
    assert results[0][1].startswith("all_reduce #1 on rank 1 (f64, 4, sum)"), results
