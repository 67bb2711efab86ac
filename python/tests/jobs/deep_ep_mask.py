"""With `enable_shrink` ranks that live are left out of low-latency calls, and taken in again. On the CPU, or with "cuda" on GPUs.
Arguments: where the ranks meet, and the device."""

import sys

import torch
import torch.distributed as dist

import unisono
from unisono.deep_ep import Buffer

place, device = sys.argv[1:]
world = unisono.init(timeout=60)
me, n = world.rank, world.world_size
dist.init_process_group("gloo", init_method=f"file://{place}", rank=me, world_size=n)
here = torch.device(device, me % torch.cuda.device_count()) if device == "cuda" else torch.device(device)
if device == "cuda":
    torch.cuda.set_device(here)
buffer = Buffer(dist.group.WORLD, enable_shrink=True, explicitly_destroy=True, device=here)
topk_idx, weights = torch.arange(n, device=here).view(n, 1), torch.ones(n, 1, device=here)
everybody = set(range(n))


def low_latency(hidden, most):
    """Rows that came to our expert, and what came back of the token for each rank's expert."""
    x = torch.full((n, hidden), 1.0 + me, device=here).bfloat16()
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, most, n, use_fp8=False)
    return (recv, handle), count.item(), (buffer.low_latency_combine(recv, topk_idx, weights, handle)[0][:, 0] / (1 + me)).tolist()


def throughput():
    to_rank, _, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(topk_idx, n)
    x = torch.full((n, 64), 1.0 + me, device=here).bfloat16()
    recv = buffer.dispatch(x, num_tokens_per_rank=to_rank, is_token_in_rank=is_in_rank, num_tokens_per_expert=to_expert, topk_idx=topk_idx)[0]
    return recv[:, 0].tolist()


def mask():
    status = torch.full((n,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return {rank for rank in range(n) if status[rank]}


def steps(members):
    """A step in each of two shapes, in which only these take part."""
    for hidden, most in [(64, n), (128, 2 * n)]:
        kept, *came = low_latency(hidden, most)
        assert came == [len(members), [float(rank in members) for rank in range(n)]], came
    return kept


def refused(call, kind, words):
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was raised: {words}")


def without(masked):
    """Ranks that others leave out: they learn it in their next call, or never call. On the CPU they can see it before."""
    dist.barrier()  # the step before is complete
    if me == 0:
        for rank in masked:
            buffer.low_latency_update_mask_buffer(rank, True)
        assert mask() == masked
    dist.barrier()
    if me not in masked:
        return steps(everybody - masked)
    assert mask() == {me} or device == "cuda"
    if me == 2:
        refused(lambda: low_latency(64, n), unisono.errors.GivenUpError, "left out")
    return None


kept = steps(everybody)
assert throughput() == [1.0 + rank for rank in range(n)]

# Nobody is left out: all stays as it is.
before = dict(buffer._buffers)
buffer.low_latency_clean_mask_buffer()
buffer.low_latency_update_mask_buffer(1)
assert all(buffer._buffers[key] is one for key, one in before.items()) and steps(everybody)

# One that knows, and one that does not.
for turn in range(2):
    for masked in ({1}, {2}, {1, 2}):
        without(masked)
        buffer.low_latency_clean_mask_buffer()
        assert mask() == set()
        kept, (recv, handle) = steps(everybody), kept
        # What was there before the first turn is still what it was; its handle is that of a buffer that has ended.
        values = {1.0 + rank for rank in range(n)}
        assert set(recv[0, : n, 0].tolist()) == values
        refused(lambda: buffer.low_latency_combine(recv, topk_idx, weights, handle), unisono.errors.ClosedError, "closed")
assert throughput() == [1.0 + rank for rank in range(n)] and all(before[key] is one for key, one in buffer._buffers.items() if key[2] is None)

# One of two.
without({1, 2})
buffer.low_latency_update_mask_buffer(3, False)  # was not left out
buffer.low_latency_update_mask_buffer(1, False)
if me == 2:
    assert mask() == {2} or device == "cuda"
    refused(lambda: low_latency(64, n), unisono.errors.GivenUpError, "left out")
else:
    steps(everybody - {2})
    assert mask() == {2}
buffer.low_latency_update_mask_buffer(2, False)
assert mask() == set() and steps(everybody)

# What cannot be.
for wrong in (-1, n):
    refused(lambda: buffer.low_latency_update_mask_buffer(wrong), ValueError, f"on rank {me}: expected a rank below {n}, got {wrong}")
refused(lambda: buffer.low_latency_update_mask_buffer(me, True), unisono.errors.ArgumentError, "another one")
if me == 3:
    refused(lambda: buffer.low_latency_update_mask_buffer(0), ValueError, "expected to take in rank 0 as here, got all ranks on rank 0")
else:
    refused(buffer.low_latency_clean_mask_buffer, ValueError, f"on rank {me}: expected to take in all ranks as here, got rank 0 on rank 3")
assert steps(everybody)
buffer.destroy()
dist.barrier()
world.destroy()
print(f"rank {me} is done")
