"""A group with a backend for each device, where torch allows it; and a group of one backend within a job of another: `torch_mixed.py FOLDER`.

Each begins in a file of its own: torch's store at an address can not be made anew at once.
"""

import os
import sys

import torch
import torch.distributed as dist

import unisono.torch

MEMBER = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
x = torch.ones(5)


def begin(backend):
    dist.init_process_group(backend, init_method=f"file://{sys.argv[1]}/{backend}", **MEMBER)


for backends in ("cpu:unisono,cuda:gloo", "cpu:gloo,cuda:unisono"):
    begin(backends)
    is_ours = torch.__version__ < (2, 14) or backends.startswith("cpu:unisono")
    assert dist.group.WORLD._get_backend(torch.device("cpu")).name() == ("unisono" if is_ours else "gloo")
    dist.all_reduce(x)
    dist.barrier()
    dist.destroy_process_group()

begin("gloo")
ours = dist.new_group(backend="unisono")
theirs = dist.new_group(backend="gloo")
dist.all_reduce(x, group=ours)
dist.all_reduce(x, group=theirs)
dist.all_reduce(x)
assert (x == dist.get_world_size() ** 5).all()
assert dist.get_backend(ours) == "unisono" and dist.get_backend() == "gloo"
dist.destroy_process_group()
print("done")
