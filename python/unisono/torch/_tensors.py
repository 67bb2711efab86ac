"""Tensors of torch as arrays of the library, and torch's reductions by their names there."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from unisono import errors

T = TypeVar("T")

NAMES = {
    hash(dist.ReduceOp(op)): name
    for op, name in [
        (dist.ReduceOp.SUM, "sum"),
        (dist.ReduceOp.PRODUCT, "prod"),
        (dist.ReduceOp.MIN, "min"),
        (dist.ReduceOp.MAX, "max"),
        (dist.ReduceOp.AVG, "avg"),
        (dist.ReduceOp.BAND, "bit_and"),
        (dist.ReduceOp.BOR, "bit_or"),
        (dist.ReduceOp.BXOR, "bit_xor"),
    ]
}
"""By the number of each, which is what a ``ReduceOp`` hashes by; its members do so by a method of Python, which takes a microsecond."""
OF_BOOL = {"sum": "max", "prod": "min"}
"""A sum of bools is whether any is true, and their product whether all are, as with torch's own backends."""
LINEAR = ("sum", "avg", "premul_sum")
KNOWN = {
    torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128,
}  # fmt: skip


def refused(call: str, rank: int | None, what: str, expected: str, got: str) -> errors.ArgumentError:
    """What is found here is told as the library tells it."""
    where = call if rank is None else f"{call} on rank {rank}"
    message = f"{where}: {what} should be {expected}, got {got}. Nothing was written."
    return errors.ArgumentError(message, rank=rank, call=call, what=what, expected=expected, got=got)


def only(list_: list[T]) -> T:
    """The one element of a list: torch's lists have one for each device that a rank drives, and that is one."""
    if len(list_) != 1:
        raise refused("a call of torch.distributed", None, "the list of tensors, or of lists of them", "of length 1", str(len(list_)))
    return list_[0]


def writable(x: torch.Tensor) -> torch.Tensor:
    """As bytes, if the library does not know its type: for what is only moved. It refuses what has gaps."""
    if x.dtype in KNOWN or x.is_sparse:
        return x
    return x.view(torch.uint8)


def flat(x: torch.Tensor) -> torch.Tensor:
    """A dense tensor as it lies in memory, as torch's own backends take it, of a type that the library knows."""
    return writable(in_order(x))


def in_order(x: torch.Tensor) -> torch.Tensor:
    """The same with its dimensions in the order in which they lie in memory. The library refuses it if there are gaps even so."""
    if x.is_sparse or x.is_contiguous():
        return x
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


def reduction(x: torch.Tensor, op: Any) -> tuple[torch.Tensor, str]:
    """A tensor and a reduction as the library takes them. It refuses the pairs that it does not have."""
    name = NAMES.get(hash(op))
    if name is None:
        scale = op.__getstate__()[1]
        name = f"premul_sum:{float(scale)!r}"
    if x.dtype is torch.bool:
        name = OF_BOOL.get(name, name)
    elif x.is_complex() and name.startswith(LINEAR):
        x = torch.view_as_real(x)
    return in_order(x), name


def count(x: torch.Tensor) -> int:
    """Elements of what ``flat`` makes of a tensor."""
    return x.numel() if x.dtype in KNOWN else x.numel() * x.element_size()


def parts_of(x: torch.Tensor, sizes: list[int], rank: int, ranks: int, what: str) -> list[int]:
    """Elements for each rank, of sizes in rows; equal ones if there are none."""
    rows = x.shape[0] if x.dim() else 0
    if not sizes:
        if rows % ranks:
            raise refused("all_to_all_single", rank, what, f"rows that {ranks} ranks can share equally", f"{rows} rows")
        sizes = [rows // ranks] * ranks
    if len(sizes) != ranks or sum(sizes) != rows or min(sizes) < 0:
        raise refused("all_to_all_single", rank, what, f"{ranks} sizes with the sum {rows}, the size of dim 0", str(list(sizes)))
    row = count(x) // rows if rows else 0
    return [size * row for size in sizes]


@torch.no_grad()
def spread(from_: torch.Tensor, outputs: list[torch.Tensor]) -> None:
    """Copies an array of parts into tensors of any layout."""
    begin = 0
    for out in outputs:
        size = out.numel() * out.element_size() // from_.element_size()
        part = from_[begin : begin + size]
        begin += size
        out.copy_(part.view(out.dtype).view(out.shape))
