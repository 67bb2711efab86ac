"""With `enable_shrink` a rank that is killed is left out of low-latency calls, and the others go on. It cannot be taken in again, whether they
have noticed its death or not. Arguments: where the ranks meet, and whether it is "masked" before it dies, on request."""

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import unisono
from unisono.deep_ep import Buffer

world = unisono.init(timeout=60)
me, n = world.rank, world.world_size
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=me, world_size=n)
buffer = Buffer(dist.group.WORLD, enable_shrink=True, device="cpu")
x, topk_idx, weights = torch.ones(n, 64).bfloat16(), torch.arange(n).view(n, 1), torch.ones(n, 1)


def step():
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, n, n, use_fp8=False)
    return count.item(), buffer.low_latency_combine(recv, topk_idx, weights, handle)[0][:, 0].tolist()


def mask():
    status = torch.full((n,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


assert step() == (n, [1.0] * n)
if sys.argv[2] == "masked":
    dist.barrier()  # the step before is complete
    if me == 0:
        buffer.low_latency_update_mask_buffer(1, True)
    dist.barrier()
    if me != 1:
        assert step() == (2, [1.0, 0.0, 1.0])
    else:
        # Once the others wait for it.
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(60)
elif me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
else:
    steps = [step() for _ in range(20)]
    assert mask() == [0, 1, 0] and steps[-1] == (2, [1.0, 0.0, 1.0]), steps
for undo in (buffer.low_latency_clean_mask_buffer, lambda: buffer.low_latency_update_mask_buffer(1, False)):
    begun = time.monotonic()
    try:
        undo()
    except unisono.errors.PeerDiedError as error:
        assert error.rank == 1 and time.monotonic() - begun < 10, error
    else:
        raise AssertionError("taken in again")
    assert mask() == [0, 1, 0] and step() == (2, [1.0, 0.0, 1.0])
buffer.low_latency_update_mask_buffer(1, True)  # it is already
print("went on", me, flush=True)
os._exit(0)  # gloo would wait for the dead
