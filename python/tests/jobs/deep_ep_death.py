"""With `enable_shrink` a rank that is killed is left out of low-latency calls, and the others go on. Argument: where the ranks meet."""

import os
import signal
import sys

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


assert step() == (n, [1.0] * n)
if me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
steps = [step() for _ in range(20)]
mask = torch.full((n,), 7, dtype=torch.int32)
buffer.low_latency_query_mask_buffer(mask)
assert mask.tolist() == [0, 1, 0] and steps[-1] == (2, [1.0, 0.0, 1.0]), (mask, steps)
for undo in (buffer.low_latency_clean_mask_buffer, lambda: buffer.low_latency_update_mask_buffer(1, False)):
    try:
        undo()
    except ValueError as error:
        assert "rank 1 was left out" in str(error)
    else:
        raise AssertionError("taken in again")
buffer.low_latency_update_mask_buffer(1, True)  # it is already
print("went on", me, flush=True)
os._exit(0)  # gloo would wait for the dead
