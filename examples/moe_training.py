"""Trains a small mixture of experts, with the experts spread over the ranks, by torch's autograd.

    python examples/moe_training.py                              # four threads
    unisono run -n 4 -- python examples/moe_training.py          # four processes; with `cuda` behind it, on GPUs

A router gives each token two of 16 experts. Forward: `dispatch` takes tokens to their experts, `combine` brings results back. Backward it is the other way
round: gradients of results go the way of the tokens (a cached dispatch), those of tokens and of weights come back (a combine). Each expert lives on one
rank; the router is the same on all, so its gradient is added up. Needs torch.
"""

from __future__ import annotations

import os
import sys

import torch

import unisono
from unisono import ep

HIDDEN, EXPERTS, TOP_K, TOKENS, STEPS, RATE = 32, 16, 2, 240, 40, 0.5


class Dispatch(torch.autograd.Function):
    """Tokens and the weights of their experts, as rows on the ranks of these."""

    @staticmethod
    def forward(ctx, x, weights, topk_idx, buffer, keep):
        sent = buffer.dispatch(x, topk_idx, topk_weights=weights)
        keep.append(sent)
        ctx.buffer, ctx.handle = buffer, sent.handle
        return sent.x, sent.topk_weights

    @staticmethod
    def backward(ctx, of_rows, of_weights):
        back = ctx.buffer.combine(of_rows.contiguous(), ctx.handle, topk_weights=of_weights.contiguous())
        return back.x, back.topk_weights, None, None, None


class Combine(torch.autograd.Function):
    """What the experts made of each token, added up where it came from."""

    @staticmethod
    def forward(ctx, rows, buffer, handle):
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(rows, handle).x

    @staticmethod
    def backward(ctx, of_x):
        rows, _ = ctx.buffer.dispatch_cached(of_x.contiguous(), ctx.handle)
        return rows, None, None


def layer(x, router, experts, buffer):
    """The mixture of experts: `[tokens, hidden]` to the same."""
    weights, topk_idx = torch.softmax(x @ router, dim=1).topk(TOP_K, dim=1)
    keep: list[ep.Dispatched] = []
    rows, row_weights = Dispatch.apply(x, weights, topk_idx, buffer, keep)
    sent = keep[0]
    results = torch.zeros_like(rows)
    for local, matrix in enumerate(experts):
        of_rows = torch.where(sent.topk_idx == local, row_weights, torch.zeros_like(row_weights)).sum(1, keepdim=True)
        results = results + of_rows * torch.tanh(rows @ matrix)
    return Combine.apply(results, buffer, sent.handle)


def random(seed, *shape, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def train(rank: unisono.Communicator, device: torch.device) -> list[float]:
    """The mean loss of each step over the tokens of all ranks."""
    x, y = random(1, TOKENS, HIDDEN, device=device), torch.sin(random(1, TOKENS, HIDDEN, device=device).roll(1, 1))
    x, y = (all_of_it.chunk(rank.world_size)[rank.rank].clone() for all_of_it in (x, y))
    losses = []
    # Dealt out like cards, so that any number of ranks will do.
    owners = [expert % rank.world_size for expert in range(EXPERTS)]
    with ep.Buffer(rank, HIDDEN, EXPERTS, dtype="float32", top_k=TOP_K, placement=owners) as buffer:
        router = random(2, HIDDEN, EXPERTS, device=device).requires_grad_()
        experts = torch.stack([random(100 + expert, HIDDEN, HIDDEN, device=device) / HIDDEN**0.5 for expert in buffer.local_experts])
        experts.requires_grad_()
        for _ in range(STEPS):
            loss = ((x + layer(x, router, experts, buffer) - y) ** 2).sum() / (TOKENS * HIDDEN)
            loss.backward()
            rank.all_reduce(router.grad)
            losses.append(rank.all_reduce(loss.detach().clone().view(1)).item())
            with torch.no_grad():
                for parameter in (router, experts):
                    parameter -= RATE * HIDDEN * parameter.grad
                    parameter.grad = None
    return losses


def main(rank: unisono.Communicator, device: torch.device) -> None:
    losses = train(rank, device)
    if rank.rank == 0:
        alone = train(unisono.Communicator.threads(1)[0], torch.device("cpu"))
        assert losses[-1] < 0.8 * losses[0], losses
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=1e-3, atol=0)
        print(f"{rank.world_size} ranks on {device.type}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, as on one rank")


if __name__ == "__main__":
    device, options = torch.device("cpu"), {}
    if sys.argv[1:] == ["cuda"]:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        options = {"device": device.index}
    try:
        communicator = unisono.init(**options)
    except unisono.errors.LaunchNothingError:
        torch.set_num_threads(1)
        unisono.on_threads(4, lambda rank: main(rank, device))
    else:
        with communicator:
            main(communicator, device)
