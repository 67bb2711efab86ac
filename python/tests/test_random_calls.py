"""Calls with arguments of all kinds, at random: each returns or raises an exception, and afterwards everything still works."""

from __future__ import annotations

import inspect
import os
import random

import ml_dtypes
import numpy as np

import unisono

CALLS = 4000 * int(os.environ.get("UNISONO_TEST_SCALE", "1"))
# What ends things, waits for others by its nature, or needs a launcher.
LEFT_OUT = {"shrink", "destroy", "abort", "close", "threads", "local"} | {
    name for name in vars(unisono.Communicator) if name.startswith("from_")
}
TIMED = {"wait", "get", "wait_signal", "multi_get", "recv", "recv_any", "send"}


class Broken:
    def __getattr__(self, name):
        raise RuntimeError(name)


class NoCapsule:
    def __init__(self, device):
        self.device = device

    def __dlpack__(self, **options):
        return 5

    def __dlpack_device__(self):
        return self.device


class Interface:
    def __init__(self, name, **items):
        setattr(self, name, items)


def arguments() -> list[object]:
    frozen = np.ones(3)
    frozen.flags.writeable = False
    host, cuda = "__array_interface__", "__cuda_array_interface__"
    return [
        None, True, 1, -1, 2**70, 1.5, float("nan"), "sum", "x", "float32", "device", b"abc", bytearray(4),
        [], [1], [-1], [1, 2], (1, 2), {}, object(), int, np.float64, len, unisono,
        Broken(), NoCapsule((1, 0)), NoCapsule("x"), NoCapsule((2, 9)),
        Interface(host), Interface(host, typestr="<f4"), Interface(host, typestr="<f4", shape=(2,), data=None),
        Interface(host, typestr="ä", shape=(2,), data=(0, False)),
        Interface(host, typestr="<f4", shape=(-3,), data=(8, False), strides=(4,)),
        Interface(host, typestr="<f4", shape="abc", data=(8, False)),
        Interface(cuda), Interface(cuda, typestr="<f4", shape=(2,), data=(4096, False)),
        Interface(cuda, typestr="<f4", shape=(2**62, 2**62), data=(4096, False)),
        np.ones(3), np.ones((2, 2)), np.ones(4, np.float32), np.ones(0), frozen, np.ones(3, ml_dtypes.bfloat16),
        np.float32(3), np.ones(6)[::2], np.array(["a"]), np.array(None), memoryview(b"ab"), np.broadcast_to(np.ones(1), (5,)),
    ]  # fmt: skip


def test_no_arguments_bring_the_process_down():
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    draw, values = random.Random(seed), arguments()
    rank = unisono.Communicator.threads(1)[0]
    memory = rank.symmetric_memory(4)
    work = rank.all_reduce(np.ones(3), async_op=True)
    buffer = unisono.ep.Buffer(rank, 8, 2, dtype="float32", capacity=4, low_latency=True)
    buffer.exchange()
    targets = [rank, memory, work, memory.local, unisono.MemoryStore(), buffer]
    returned = raised = 0
    for _ in range(CALLS):
        target = draw.choice(targets)
        public = [name for name in vars(type(target).__mro__[-2]) if not name.startswith("_") and name not in LEFT_OUT]
        name = draw.choice([*(name for name in public if callable(getattr(target, name, None))), "__dlpack__"])
        if not hasattr(target, name):
            continue
        positional, named = [], {}
        for parameter in inspect.signature(getattr(target, name)).parameters.values():
            if parameter.default is not parameter.empty and draw.random() < 0.6:
                continue
            if parameter.kind == parameter.KEYWORD_ONLY or parameter.default is not parameter.empty:
                named[parameter.name] = draw.choice(values)
            else:
                positional.append(draw.choice(values))
        if name in TIMED:
            named["timeout"] = 0.001
        try:
            getattr(target, name)(*positional, **named)
            returned += 1
        except Exception:  # not a panic, which is no Exception
            raised += 1
    assert returned > CALLS / 20 and raised > CALLS / 20
    fresh = unisono.Communicator.threads(1)[0]
    assert fresh.all_reduce(np.full(2, 3.0)).tolist() == [3.0, 3.0]
    fresh.destroy()
