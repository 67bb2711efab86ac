"""Calls the module `deep_ep` as engines do, and compares with what torch computes from the tokens of all ranks. On the CPU, or with "cuda"
on GPUs. Arguments: where the ranks meet, and the device."""

import sys

import torch
import torch.distributed as dist

import unisono
from unisono import deep_ep

deep_ep.install()
from deep_ep import Buffer, Config, EventHandle, EventOverlap  # noqa: E402

place, device = sys.argv[1:]
world = unisono.init(timeout=60)
me, n = world.rank, world.world_size
dist.init_process_group("gloo", init_method=f"file://{place}", rank=me, world_size=n)
here = torch.device(device, me % torch.cuda.device_count()) if device == "cuda" else torch.device(device)
if device == "cuda":
    torch.cuda.set_device(here)
on = {} if device == "cuda" else {"device": "cpu"}
buffer = Buffer(dist.group.WORLD, 1 << 20, 1 << 16, low_latency_mode=True, num_qps_per_rank=8, explicitly_destroy=True, **on)
assert (buffer.rank, buffer.group_size, buffer.runtime.is_available(), buffer.runtime.get_num_rdma_ranks()) == (me, n, True, 1)


def error(x, y):
    if not x.numel():
        return 0.0
    x, y = x.double() + 1, y.double() + 1
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


def everybody(x):
    """The tensors of all ranks."""
    lists = [None] * n
    dist.all_gather_object(lists, x.cpu())
    return [one.to(here) for one in lists]


# Throughput.
hidden, experts, top_k = 256, 4 * n, 3
local = experts // n
tokens = 37 + 11 * me if me != 1 else 0
torch.manual_seed(me)
x = torch.randn(tokens, hidden, device=here).bfloat16()
topk_idx = torch.rand(tokens, experts, device=here).topk(top_k, dim=-1).indices
topk_idx[torch.rand(topk_idx.shape, device=here) < 0.2] = -1
weights = torch.rand(tokens, top_k, device=here)
indices_of, x_of, weights_of = everybody(topk_idx), everybody(x), everybody(weights)
owners = [torch.where(indices < 0, -1, indices // local) for indices in indices_of]
goes = [torch.stack([(owner == rank).any(1) for rank in range(n)], 1) for owner in owners]
expected = torch.cat([x_of[source][goes[source][:, me]] for source in range(n)])
mine = torch.cat([indices_of[source][goes[source][:, me]] for source in range(n)])
rebased = torch.where((mine >= 0) & (mine // local == me), mine % local, -1)
counts = [int(sum((indices == me * local + at).sum() for indices in indices_of)) for at in range(local)]
prefix = torch.stack([goes[source].sum(0) for source in range(n)]).cumsum(0)
sources = torch.cat([goes[source][:, me].nonzero()[:, 0] for source in range(n)])

for turn in range(2):  # before there is any buffer, and with one
    to_rank, nodes, to_expert, is_in_rank, event = buffer.get_dispatch_layout(topk_idx, experts, previous_event=Buffer.capture(), async_finish=turn == 1)
    if turn:
        event.current_stream_wait()
    assert nodes is None and torch.equal(is_in_rank, goes[me]) and torch.equal(to_rank, goes[me].sum(0, dtype=torch.int32))
    assert to_expert.tolist() == [(topk_idx == expert).sum().item() for expert in range(experts)]
    assert (to_rank.dtype, to_expert.dtype, is_in_rank.dtype) == (torch.int32, torch.int32, torch.bool)
    layout = dict(num_tokens_per_rank=to_rank, is_token_in_rank=is_in_rank, num_tokens_per_expert=to_expert)
    for with_top_k in (False, True):
        for is_async in (False, True):
            top = dict(topk_idx=topk_idx, topk_weights=weights) if with_top_k else {}
            previous = Buffer.capture() if is_async else None
            recv, idx, w, lists, handle, event = buffer.dispatch(
                x, **layout, **top, expert_alignment=8, config=Config(24, 8, 128), previous_event=previous, async_finish=is_async,
                allocate_on_comm_stream=is_async)
            with event:
                pass
            assert torch.equal(recv, expected) and lists == [-(-count // 8) * 8 for count in counts]
            assert torch.equal(handle[0].long(), prefix) and torch.equal(handle[3].long(), sources) and len(handle) == 6
            assert torch.equal(handle[4], goes[me])
            if with_top_k:
                assert torch.equal(idx, rebased) and w.shape == idx.shape and (w[idx < 0] == 0).all()
            else:
                assert idx is None and w is None
            assert buffer.dispatch(x, handle=handle)[1:5] == (None,) * 4
            assert torch.equal(buffer.dispatch(x, handle=handle)[0], expected)
            combined, back, event = buffer.combine(recv, handle, topk_weights=w, async_finish=is_async, config=Buffer.get_combine_config(n))
            with event:
                pass
            ranks = goes[me].sum(1, keepdim=True)
            assert error(combined.float(), x.float() * ranks) < 5e-6 and combined.dtype == torch.bfloat16
            if with_top_k:
                assert torch.allclose(back, torch.where(topk_idx < 0, torch.zeros_like(weights), weights))

# Bias, eight bits with scales of columns, rows for the worst case.
bias = torch.randn(tokens, hidden, device=here).bfloat16()
plain, two = buffer.combine(recv, handle)[0], buffer.combine(recv, handle, bias=(bias, bias))[0]
assert error(two.float(), plain.float() + 2 * bias.float()) < 5e-5
assert torch.equal(buffer.combine(recv, handle, bias=(bias, None))[0], buffer.combine(recv, handle, bias=bias)[0])
codes, scales = x.to(torch.float8_e4m3fn), torch.rand(2, tokens + 3, device=here)[:, :tokens].t()
scales_of = everybody(scales.contiguous())
(recv8, recv_scales), *_ = buffer.dispatch((codes, scales), **layout, topk_idx=topk_idx)
assert torch.equal(recv8.float(), expected.to(torch.float8_e4m3fn).float())
assert torch.equal(recv_scales, torch.cat([scales_of[source][goes[source][:, me]] for source in range(n)]))
worst = 300 * n
recv, idx, w, lists, handle, _ = buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=weights, num_worst_tokens=worst)
assert recv.shape == (worst, hidden) and lists == [] and (idx[len(expected) :] == -1).all() and torch.equal(recv[: len(expected)], expected)
assert error(buffer.combine(recv, handle)[0].float(), x.float() * goes[me].sum(1, keepdim=True)) < 5e-6
between = buffer.internode_dispatch(x, **layout, topk_idx=topk_idx, topk_weights=weights)
assert torch.equal(between[0], expected)
assert torch.equal(buffer.internode_combine(between[0], between[4])[0], plain)

# Low latency.
most, hidden, experts = 16, 1024, 2 * n
tokens = min(most, 5 + 4 * me)
x = torch.randn(tokens, hidden, device=here).bfloat16()
topk_idx = torch.rand(tokens, experts, device=here).topk(2, dim=-1).indices
topk_idx[torch.rand(topk_idx.shape, device=here) < 0.1] = -1
weights = torch.rand(tokens, 2, device=here)
indices_of, x_of = everybody(topk_idx), everybody(x)
expected = x.float() * torch.where(topk_idx < 0, torch.zeros_like(weights), weights).sum(1, keepdim=True)
total = torch.zeros(experts // n, dtype=torch.int32, device=here)
cost = torch.zeros(n, dtype=torch.int64, device=here)
buffer.clean_low_latency_buffer(most, hidden, experts)
kinds = [dict(use_fp8=False), dict(), dict(round_scale=True), dict(round_scale=True, use_ue8m0=True)]
for times, kind in enumerate(kinds, 1):
    for with_hook in (False, True):
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            x, topk_idx, most, experts, cumulative_local_expert_recv_stats=total, dispatch_wait_recv_cost_stats=cost,
            return_recv_hook=with_hook, async_finish=not with_hook, **kind)
        values = recv if kind == kinds[0] else recv[0]
        assert values.shape == (experts // n, n * most, hidden) and count.shape == (experts // n,)
        hook() if with_hook else event.current_stream_wait()
        if kind == kinds[0]:
            result = recv.clone()
        else:
            codes, scales = recv
            assert scales.stride(1) == 1 and codes.dtype == torch.float8_e4m3fn
            if "use_ue8m0" in kind:
                assert scales.shape == (experts // n, n * most, hidden // 512) and scales.dtype == torch.int32
                exponents = scales.contiguous().view(torch.uint8).reshape(experts // n, n * most, hidden // 128)
                scales = torch.exp2(exponents.float() - 127)
            assert scales.shape == (experts // n, n * most, hidden // 128)
            result = (codes.float().view(*scales.shape, 128) * scales.unsqueeze(-1)).view(codes.shape).bfloat16()
        source, ranges, *sizes = handle
        assert sizes == [most, hidden, experts]
        for at in range(experts // n):
            expert, begin = me * (experts // n) + at, 0
            for rank in range(n):
                there = (indices_of[rank] == expert).any(1).nonzero()[:, 0]
                assert ranges[at, rank].item() == begin << 32 | len(there)
                rows = slice(begin, begin + len(there))
                assert torch.equal(source[at, rows].long(), there)
                assert error(result[at, rows].float(), x_of[rank][there].float()) < 9e-4
                begin += len(there)
            assert count[at] == begin
        out = torch.full((tokens, hidden), 7.0, dtype=torch.bfloat16, device=here)
        combined, event, hook = buffer.low_latency_combine(result, topk_idx, weights, handle, return_recv_hook=with_hook, out=out)
        hook() if with_hook else None
        assert combined is out and error(out.float(), expected) < (1e-5 if kind == kinds[0] else 9e-4)
        buffer.get_next_low_latency_combine_buffer(handle)[:] = result
        zero, _, hook = buffer.low_latency_combine(result, topk_idx, weights, handle, zero_copy=True, return_recv_hook=with_hook,
                                                   combine_wait_recv_cost_stats=cost)
        hook() if with_hook else None
        assert torch.equal(zero, out)
        rough, *_ = buffer.low_latency_combine(result, topk_idx, weights, handle, use_logfmt=True)
        assert error(rough.float(), expected) < 2e-3
        assert torch.equal(total, count * (2 * times - 1 + with_hook))

# The rest.
status = torch.full((n,), 5, dtype=torch.int32, device=here)
buffer.low_latency_query_mask_buffer(status)
buffer.low_latency_clean_mask_buffer()
assert not status.any()
assert buffer.get_local_buffer_tensor(torch.float32).shape == (1 << 18,)
assert buffer.get_local_buffer_tensor(torch.int64, torch.Size([2, 8]), 64, use_rdma_buffer=True).shape == (2, 8)
for wrong, kind, words in [
    (lambda: buffer.dispatch(x), ValueError, "what get_dispatch_layout gives"),
    (lambda: buffer.low_latency_dispatch(x, topk_idx, most, experts, async_finish=True, return_recv_hook=True), ValueError, "got both"),
    (lambda: buffer.low_latency_dispatch(torch.zeros(most + 1, hidden, device=here).bfloat16(), topk_idx, most, experts), unisono.UnisonoError, "topk_idx"),
    (lambda: EventOverlap().current_stream_wait(), ValueError, "without async_finish"),
    (lambda: Buffer(None), ValueError, "neither"),
]:
    try:
        wrong()
    except kind as caught:
        assert words in str(caught), caught
    else:
        raise AssertionError(words)
EventOverlap(EventHandle(), (x,)).current_stream_wait()


class Comm:
    """What is asked of a communicator of mpi4py."""

    def Get_rank(self):
        return me

    def Get_size(self):
        return n

    def bcast(self, value, root):
        box = [value]
        dist.broadcast_object_list(box, root)
        return box[0]


other = Buffer(None, comm=Comm(), enable_shrink=True, explicitly_destroy=True, **on)
recv, count, handle, _, _ = other.low_latency_dispatch(x, topk_idx, most, experts, use_fp8=False)
assert error(other.low_latency_combine(recv, topk_idx, weights, handle)[0].float(), expected) < 1e-5
other.low_latency_update_mask_buffer(0, False)
other.destroy()
buffer.destroy()
assert not buffer.runtime.is_available()
dist.barrier()
world.destroy()
print(f"rank {me} is done")
