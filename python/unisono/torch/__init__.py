"""The backend ``"unisono"`` of ``torch.distributed``, for tensors on CPUs and on NVIDIA GPUs. Needs torch 2.11 or later.

    import torch.distributed as dist
    import unisono.torch                        # registers it; torch 2.14 and later find it by themselves

    dist.init_process_group("unisono")          # under torchrun, `unisono run`, or with init_method= and so on

DDP, FSDP, DTensor, functional collectives and everything else on top of ``torch.distributed`` then run unchanged, and what this library
promises holds: equal bits on all ranks in every run, and a dead, late or disagreeing rank is an exception of ``unisono.errors`` that
names it, on all others.

- The ranks of a group meet in the store that torch gives; they are those of one host in this release.
- ``timeout=`` of ``init_process_group`` and ``new_group`` is the longest that a call waits for ranks that live.
  ``pg_options=`` may be a dict of options of ``Communicator.from_env``, as ``{"order": "rank"}``.
- On CPUs a call with ``async_op=True`` is taken along by a thread while the program computes. On GPUs it goes into a stream of the group,
  behind the current one, and ``wait()`` has the current stream wait for it.
- Each group has one GPU per rank: that of ``torch.cuda.set_device``, if all ranks called it before the group was made; otherwise that of
  the first tensor, and then all ranks of the group make their first call on GPUs together.
- Tensors are dense, as torch's own backends need them; lists of tensors may be anything. ``AVG`` and ``PREMUL_SUM`` work for all types but
  bool. A sparse tensor, or a reduction that a type does not have, is refused with an exception, before anything is sent.
"""

from __future__ import annotations

from ._register import register

__all__ = ["register"]

register()
