"""Rank 1 is killed; the others learn it within a second, by an error that names it, wherever they wait: `torch_death.py KIND FILE [cuda]`,
with a file for the time at which it dies. On GPUs calls only enqueue, so there they are made until one says it."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import unisono
import unisono.torch

KIND, FILE = sys.argv[1:3]
ON = torch.device("cpu")
torch.set_num_threads(1)
if "cuda" in sys.argv:
    ON = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(ON)
dist.init_process_group("unisono", timeout=timedelta(seconds=60))
me, n = dist.get_rank(), dist.get_world_size()
x = torch.ones(1_000_000, device=ON)


def future():
    dist.all_reduce(x, async_op=True).get_future().wait()


def training():
    model = DistributedDataParallel(torch.nn.Linear(100, 100).to(ON))
    while True:
        model(torch.ones(4, 100, device=ON)).sum().backward()
        settle()
        if me == 1:
            die()


def settle():
    if ON.type == "cuda":
        torch.cuda.synchronize()


def die():
    settle()
    with open(FILE, "w") as file:
        file.write(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


WAITS = {
    "all_reduce": lambda: dist.all_reduce(x),
    "async": lambda: dist.all_reduce(x, async_op=True).wait(),
    "future": future,
    "recv": lambda: dist.recv(x, 1),
    "recv from anybody": lambda: dist.recv(x) if me == 0 else dist.recv(x, 1),
    "barrier": dist.barrier,
    "object": lambda: dist.all_gather_object([None] * n, "me"),
    "training": training,
}
dist.all_reduce(x)
if me == 1 and KIND != "training":
    time.sleep(0.5)
    die()
try:
    WAITS[KIND]()
    while ON.type == "cuda":
        settle()
        WAITS[KIND]()
except RuntimeError as error:
    with open(FILE) as file:
        took = time.monotonic() - float(file.read())
    assert took < 1, took
    assert "rank 1" in str(error) and "died" in str(error), error
    if KIND not in ("training", "future"):
        assert isinstance(error, unisono.errors.PeerDiedError) and error.rank == 1, error
    settle()  # the context lives
    print(f"rank {me} knew after {took:.4f} s")
else:
    raise AssertionError("nothing was noticed")
dist.destroy_process_group()
