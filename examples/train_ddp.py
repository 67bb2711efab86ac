"""Data-parallel training: every rank computes gradients on its own part of the batch, and they are averaged over all ranks.

    unisono run -n 2 -- python examples/train_ddp.py                    # on CPUs
    torchrun --nproc-per-node 8 examples/train_ddp.py --device cuda     # a GPU for each rank
    torchrun --nproc-per-node 8 examples/train_ddp.py --device cuda --backend nccl     # the same with NCCL

With torch: a transformer that learns to go on with patterns which repeat, by DistributedDataParallel on the backend "unisono". Without torch,
or with --framework numpy: a network of two layers in numpy, whose gradients go through a `unisono.Communicator` in one array.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time

VOCABULARY, LENGTH, BATCH = 16, 48, 16


def with_torch(steps: int, device: str, backend: str) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    if backend == "unisono":
        import unisono.torch  # noqa: F401  registers it

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1000 + rank)  # every rank has data of its own
    torch.manual_seed(0)

    class Transformer(nn.Module):
        def __init__(self, width: int = 64, layers: int = 2) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, width)
            self.places = nn.Embedding(LENGTH, width)
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.head = nn.Linear(width, VOCABULARY)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=tokens.device)
            x = self.tokens(tokens) + self.places(torch.arange(LENGTH, device=tokens.device))
            return self.head(self.layers(x, mask, is_causal=True))

    def batch() -> torch.Tensor:
        """Random patterns of 4 tokens, each repeated over the whole length and one token more."""
        pattern = torch.randint(VOCABULARY, (BATCH, 4), generator=generator)
        return pattern.repeat(1, LENGTH // 4 + 1)[:, : LENGTH + 1].to(device)

    model = DistributedDataParallel(Transformer().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin = time.perf_counter()
    for step in range(steps):
        tokens = batch()
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            dist.all_reduce(mean := loss.detach().clone())
            if rank == 0:
                print(f"step {step:4} loss {float(mean) / ranks:.3f}", flush=True)
    took = time.perf_counter() - begin
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"{took / steps * 1e3:.2f} ms per step; all ranks have the same weights: {torch.equal(low, high)}")
    dist.destroy_process_group()


def with_numpy(steps: int) -> None:
    import numpy as np

    import unisono

    with unisono.init() as world:
        data = np.random.default_rng(1000 + world.rank)  # every rank has data of its own
        start = np.random.default_rng(0)
        sizes = [(8, 64), (64,), (64, 1), (1,)]
        weights = start.normal(0, 0.3, sum(int(np.prod(size)) for size in sizes)).astype(np.float32)
        gradient = np.empty_like(weights)

        def split(flat):
            """The layers, as views of one array."""
            ends = np.cumsum([int(np.prod(size)) for size in sizes])[:-1]
            return [part.reshape(size) for part, size in zip(np.split(flat, ends), sizes)]

        begin = time.perf_counter()
        for step in range(steps):
            x = data.normal(size=(BATCH, 8)).astype(np.float32)
            y = np.sin(x.sum(1, keepdims=True))
            into, into_bias, out, out_bias = split(weights)
            hidden = np.tanh(x @ into + into_bias)
            error = hidden @ out + out_bias - y
            loss = np.array([np.mean(error**2)])
            d_error = 2 * error / BATCH
            d_hidden = d_error @ out.T * (1 - hidden**2)
            for target, value in zip(split(gradient), (x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_error, d_error.sum(0))):
                target[...] = value
            world.all_reduce(gradient, "avg")
            weights -= 0.1 * gradient
            if step % 20 == 0 or step == steps - 1:
                world.all_reduce(loss, "avg")
                if world.rank == 0:
                    print(f"step {step:4} loss {loss[0]:.3f}", flush=True)
        took = time.perf_counter() - begin
        low, high = world.all_reduce(weights.copy(), "min"), world.all_reduce(weights.copy(), "max")
        if world.rank == 0:
            print(f"{took / steps * 1e3:.2f} ms per step; all ranks have the same weights: {np.array_equal(low, high)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", default="unisono")
    parser.add_argument("--framework", choices=["torch", "numpy"])
    options = parser.parse_args()
    framework = options.framework or ("torch" if importlib.util.find_spec("torch") else "numpy")
    if framework == "torch":
        with_torch(options.steps, options.device, options.backend)
    else:
        with_numpy(options.steps)


if __name__ == "__main__":
    main()
