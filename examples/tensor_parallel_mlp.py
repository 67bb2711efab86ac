"""Trains a small MLP whose layers are spread over the ranks (tensor parallelism), and compares with the same on one rank.

    python examples/tensor_parallel_mlp.py                       # four threads
    unisono run -n 4 -- python examples/tensor_parallel_mlp.py   # four processes; torchrun and mpirun do as well

The first matrix is cut by columns, the second by rows: each rank has a part of the hidden units. What the second layer makes of them on each rank is
added up by an all-reduce in the forward pass, and the gradient of the input by another one in the backward pass; everything else is local. Needs numpy.
"""

from __future__ import annotations

import numpy as np

import unisono

FEATURES, HIDDEN, OUTPUTS, SAMPLES = 16, 64, 4, 256
RATE, STEPS = 0.05, 60


def problem() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Inputs, targets and the first weights, the same on all ranks."""
    random = np.random.default_rng(7)
    x = random.normal(size=(SAMPLES, FEATURES))
    y = np.sin(x @ random.normal(size=(FEATURES, OUTPUTS)))
    shapes = [(FEATURES, FEATURES), (FEATURES, HIDDEN), (HIDDEN, OUTPUTS)]
    return x, y, [random.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes]


def train(rank: unisono.Communicator | None) -> list[float]:
    """The loss of each step; of this rank's part of the hidden units, or of all of them without a communicator."""
    x, y, (first, up, down) = problem()
    if rank is not None:
        part = np.array_split(np.arange(HIDDEN), rank.world_size)[rank.rank]
        up, down = up[:, part].copy(), down[part].copy()
    add = rank.all_reduce if rank is not None else lambda partial: partial
    losses = []
    for _ in range(STEPS):
        # Forward: a layer that every rank has, then one that is spread over them.
        embedded = np.tanh(x @ first)
        hidden = embedded @ up
        active = np.maximum(hidden, 0.0)
        result = add(active @ down)
        error = result - y
        losses.append(float((error**2).mean()))
        # Backward.
        of_result = 2.0 * error / error.size
        of_hidden = (of_result @ down.T) * (hidden > 0)
        of_embedded = add(of_hidden @ up.T) * (1.0 - embedded**2)
        down -= RATE * active.T @ of_result * OUTPUTS
        up -= RATE * embedded.T @ of_hidden * OUTPUTS
        first -= RATE * x.T @ of_embedded * OUTPUTS
    return losses


def main(rank: unisono.Communicator) -> None:
    losses, alone = train(rank), train(None)
    np.testing.assert_allclose(losses, alone, rtol=1e-9)
    assert losses[-1] < 0.7 * losses[0], losses
    if rank.rank == 0:
        print(f"{rank.world_size} ranks: loss {losses[0]:.4f} -> {losses[-1]:.4f}, as on one rank")


if __name__ == "__main__":
    try:
        communicator = unisono.init()
    except unisono.errors.LaunchNothingError:
        unisono.on_threads(4, main)
    else:
        with communicator:
            main(communicator)
