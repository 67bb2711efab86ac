"""How torch learns of the backend, and the few functions of torch that cannot do with one of Python what they do with torch's own."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import _jit_internal
from torch.distributed import distributed_c10d

from ._backend import ALIVE, IS_GROUP, Backend

MINIMUM = (2, 11)


def register() -> None:
    """Registers the backend, if it is not. ``import unisono.torch`` does so; torch calls it where it finds backends by itself.

    Raises ``ImportError`` for a torch that is too old.
    """
    if torch.__version__ < MINIMUM:
        raise ImportError(f"unisono.torch needs torch 2.11 or later, and this is {torch.__version__}")
    if hasattr(dist.Backend, "UNISONO"):
        return
    dist.Backend.register_backend("unisono", create, extended_api=True, devices=["cpu", "cuda"])
    for own in (monitored_barrier, batch_isend_irecv) if IS_GROUP else (recv,):
        theirs = getattr(distributed_c10d, own.__name__)
        ours = functools.wraps(theirs)(functools.partial(own, theirs))
        setattr(distributed_c10d, own.__name__, ours)
        setattr(dist, own.__name__, ours)
    _jit_internal._extract_tensors = functools.partial(extract_tensors, _jit_internal._extract_tensors)


def create(given: Any, options: Any) -> Backend:
    """A group of ranks, which all call it."""
    if not (options is None or isinstance(options, dict)):
        raise TypeError(f"pg_options of unisono are a dict of options of unisono.Communicator, and not {type(options).__name__}")
    backend = Backend(given.store, given.group_rank, given.group_size, given.timeout, options or {})
    ALIVE.add(backend)
    return backend


def monitored_barrier(theirs: Any, group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> None:
    """torch's own refuses all backends but Gloo, before 2.14."""
    ours = group or dist.GroupMember.WORLD
    if isinstance(ours, Backend):
        return ours.monitored_barrier(timeout, wait_all_ranks)
    return theirs(group, timeout, wait_all_ranks)


def batch_isend_irecv(theirs: Any, p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
    """torch's own posts one message after the other, before 2.14. On a GPU, where messages follow each other in a stream, two ranks that
    send to each other first would wait for ever; so there they are posted together."""
    ours = p2p_op_list[0].group or dist.GroupMember.WORLD if p2p_op_list else None
    if not isinstance(ours, Backend) or not p2p_op_list[0].tensor.is_cuda:
        return theirs(p2p_op_list)
    ours.start_coalescing()
    try:
        theirs(p2p_op_list)
    except BaseException:
        ours.drop_coalesced()
        raise
    return [ours.end_coalescing()]


def extract_tensors(theirs: Any, value: Any) -> list[torch.Tensor]:
    """The tensors in the value of a future, which C++ asks for when a future of Python is completed, and DDP once more for each bucket. torch's own
    finds them by pickling, which takes 5 µs; here values are lists of tensors."""
    if type(value) is list and all(isinstance(x, torch.Tensor) for x in value):
        return value
    return theirs(value)


def recv(theirs: Any, tensor: torch.Tensor, src: Any = None, group: Any = None, tag: int = 0, group_src: Any = None) -> int:
    """From 2.14 on torch's own cannot ask a backend of Python who sent a message that was taken from anybody."""
    world = group or dist.GroupMember.WORLD
    if src is None and group_src is None and isinstance(world, dist.ProcessGroup):
        ours = world._get_backend(tensor.device)
        if isinstance(ours, Backend):
            work = ours.recv_anysource([tensor], tag)
            work.wait()
            return dist.get_global_rank(world, work.source)
    return theirs(tensor, src, group, tag, group_src)
