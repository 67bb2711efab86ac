"""Rank 1 is killed in the middle of a job; the others say who died, and go on without it."""

import os
import signal

import numpy as np

import unisono

rank = unisono.init(timeout=60)
x = np.ones(1000)
rank.all_reduce(x)
if rank.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        rank.all_reduce(x)
except unisono.errors.PeerDiedError as error:
    assert error.rank == 1 and error.survivors == [0, 2], vars(error)
    assert error.call.startswith("all_reduce #") or error.call == "an earlier call", error.call
rank = rank.shrink()
print("went on", rank.rank, "of", rank.world_size, rank.all_reduce(np.ones(1)).tolist())
rank.destroy()
