"""What is built on `torch.distributed`, on the backend "unisono" and on CPUs: DDP, FSDP2, DTensor and functional collectives give what
one process gives that has the data of all ranks."""

import copy

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import unisono.torch

torch.set_num_threads(1)  # ranks share the processors
torch.manual_seed(5)
dist.init_process_group("unisono")
me, n = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (n,))


def model():
    return nn.Sequential(nn.Linear(20, 300), nn.LayerNorm(300), nn.GELU(), nn.Linear(300, 300), nn.GELU(), nn.Linear(300, 4)).double()


def train(step, optimizer, inputs, targets):
    losses = []
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(step(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


STEPS, BATCH = 5, 8
inputs = torch.randn(STEPS, n * BATCH, 20, dtype=torch.float64)
targets = torch.randn(STEPS, n * BATCH, 4, dtype=torch.float64)
mine = slice(me * BATCH, (me + 1) * BATCH)
alone = model()
started = copy.deepcopy(alone)
optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
expected_losses = train(alone, optimizer, inputs, targets)

# DDP: as usual, in buckets of a few KiB (several reductions in flight), with a hook, and with views as gradients.
for how in [{}, {"bucket_cap_mb": 0.01}, {"bucket_cap_mb": 0.01, "gradient_as_bucket_view": True}, "hook"]:
    replica = copy.deepcopy(started)
    if me > 0:
        for parameter in replica.parameters():  # rank 0 tells them
            nn.init.zeros_(parameter)
    ddp = DistributedDataParallel(replica, **({} if how == "hook" else how))
    if how == "hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        ddp.register_comm_hook(None, allreduce_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    losses = train(ddp, optimizer, inputs[:, mine], targets[:, mine])
    for loss, expected in zip(losses, expected_losses, strict=True):
        dist.all_reduce(loss, dist.ReduceOp.AVG)
        torch.testing.assert_close(loss, expected)
    for got, expected in zip(replica.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
    # The same bits on all ranks.
    for parameter in replica.parameters():
        low, high = parameter.detach().clone(), parameter.detach().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        assert torch.equal(low, high)
print("DDP is right")

# FSDP2, a layer at a time.
sharded = copy.deepcopy(started)
for layer in sharded:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1, momentum=0.9)
train(sharded, optimizer, inputs[:, mine], targets[:, mine])
for got, expected in zip(sharded.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(got.full_tensor(), expected.detach())
print("FSDP2 is right")

# DTensor.
a, b = torch.randn(n * 3, 10), torch.randn(10, n * 5)
for placements in [(Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(1), Shard(0))]:
    product = distribute_tensor(a, mesh, [placements[0]]) @ distribute_tensor(b, mesh, [placements[1]])
    assert isinstance(product, DTensor)
    torch.testing.assert_close(product.full_tensor(), a @ b)
moved = distribute_tensor(a, mesh, [Shard(0)]).redistribute(mesh, [Shard(1)])
torch.testing.assert_close(moved.full_tensor(), a)
print("DTensor is right")

# Functional collectives, as compiled programs call them.
group = dist.group.WORLD
x = torch.full((n, 4), me + 1.0)
total = n * (n + 1) / 2
assert (functional.all_reduce(x, "sum", group) == total).all()
assert (functional.all_reduce(x, "avg", group) == total / n).all()
gathered = functional.all_gather_tensor(x, 0, group)
assert gathered.shape == (n * n, 4) and (gathered[:: n, 0] == torch.arange(1, n + 1)).all()
assert (functional.reduce_scatter_tensor(x, "sum", 0, group) == total).all()
assert (functional.all_to_all_single(x, None, None, group)[:, 0] == torch.arange(1, n + 1)).all()
assert (functional.broadcast(x, n - 1, group) == n).all()
several = functional.all_reduce_coalesced([x, 2 * x], "sum", group)
assert (several[0] == total).all() and (several[1] == 2 * total).all()
several = functional.all_gather_into_tensor_coalesced([x, 2 * x], group)
assert (several[1][-1] == 2 * n).all()
print("functional collectives are right")

dist.destroy_process_group()
print(f"rank {me} is done")
