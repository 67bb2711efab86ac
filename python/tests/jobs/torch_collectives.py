"""Every method of the backend "unisono" against the arithmetic of torch itself, on tensors of the host or, with `cuda`, of GPUs."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import unisono
import unisono.torch

ON = sys.argv[1] if len(sys.argv) > 1 else "cpu"
if ON == "cuda":
    ON = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(ON)
torch.set_num_threads(1)  # ranks share the processors
dist.init_process_group("unisono", timeout=timedelta(seconds=60))
me, n = dist.get_rank(), dist.get_world_size()
right, left = (me + 1) % n, (me - 1) % n
seed = torch.tensor([int.from_bytes(os.urandom(4), "little")])
dist.broadcast(seed, 0)
print("seed", int(seed))

Op = dist.ReduceOp
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
MOVED = [torch.bool, *INTEGERS, *FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2fnuz, *COMPLEX]


def data(rank, dtype, *shape, salt=0):
    """The same on every rank that asks for `rank`."""
    generator = torch.Generator().manual_seed(int(seed) + 1000 * salt + rank)
    if dtype is torch.bool:
        made = torch.rand(shape, generator=generator) < 0.5
    elif dtype in INTEGERS:
        info = torch.iinfo(dtype)
        made = torch.randint(max(info.min, -(2**40)), min(info.max, 2**40), shape, generator=generator).to(dtype)
    elif dtype in COMPLEX:
        made = torch.randn(shape, dtype=dtype, generator=generator)
    else:
        made = torch.randn(shape, generator=generator).to(dtype)
    return made.to(ON)


def everybodys(dtype, *shape, salt=0):
    return [data(rank, dtype, *shape, salt=salt) for rank in range(n)]


def poisoned(dtype, *shape):
    return data(99, dtype, *shape)


def same(got, expected, *what):
    bits = [x.contiguous().reshape(-1).view(torch.uint8) if x.dtype is not torch.bool else x for x in (got, expected)]
    assert got.shape == expected.shape and torch.equal(*bits), (*what, got, expected)


def reduced(op, inputs):
    """In rank order, in the accumulator that the library promises."""
    dtype = inputs[0].dtype
    if dtype.is_complex:
        return torch.view_as_complex(reduced(op, [torch.view_as_real(x) for x in inputs]))
    if dtype is torch.bool:
        inputs = [x.to(torch.uint8) for x in inputs]
        op = {Op.SUM: Op.MAX, Op.PRODUCT: Op.MIN}.get(op, op)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else inputs[0].dtype
    total = inputs[0].to(wide)
    for x in inputs[1:]:
        x = x.to(wide)
        if op in (Op.SUM, Op.AVG):
            total = total + x
        elif op is Op.PRODUCT:
            total = total * x
        elif op in (Op.MIN, Op.MAX):
            total = (torch.minimum if op is Op.MIN else torch.maximum)(total, x)
        else:
            total = {Op.BAND: torch.bitwise_and, Op.BOR: torch.bitwise_or, Op.BXOR: torch.bitwise_xor}[op](total, x)
    if op is Op.AVG:
        total = torch.div(total, n, rounding_mode=None if wide.is_floating_point else "trunc")
    return total.to(dtype)


def refuses(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"{call.__name__} took what it should refuse")


ORDERED, BITS = [Op.SUM, Op.PRODUCT, Op.MIN, Op.MAX, Op.AVG], [Op.BAND, Op.BOR, Op.BXOR]
PAIRS = [
    *((torch.bool, op) for op in [Op.SUM, Op.PRODUCT, Op.MIN, Op.MAX, *BITS]),
    *((dtype, op) for dtype in INTEGERS for op in ORDERED + BITS),
    *((dtype, op) for dtype in FLOATS for op in ORDERED),
    *((dtype, op) for dtype in COMPLEX for op in (Op.SUM, Op.AVG)),
]

if ON != "cpu":  # there each pair is a kernel, which takes two seconds to compile
    PAIRS = [(dtype, op) for dtype in (torch.int32, torch.int64, torch.float16, torch.bfloat16) for op in (Op.SUM, Op.AVG)]
    PAIRS += [(torch.float32, op) for op in ORDERED] + [(torch.bool, Op.SUM), (torch.uint8, Op.BXOR), (torch.complex64, Op.SUM)]

# Reductions: of 7 elements, which are inline, and of so many that they go in chunks.
for dtype, op in PAIRS:
    for size in (7, 70_001):
        inputs = everybodys(dtype, size)
        expected = reduced(op, inputs)
        x = inputs[me].clone()
        assert dist.all_reduce(x, op) is None
        same(x, expected, "all_reduce", dtype, op)
        x = inputs[me].clone()
        work = dist.all_reduce(x, op, async_op=True)
        work.wait()
        same(x, expected, "all_reduce, async", dtype, op)
        root = size % n
        x = inputs[me].clone()
        dist.reduce(x, root, op)
        same(x, expected if me == root else inputs[me], "reduce", dtype, op)
    inputs = everybodys(dtype, n, 5)
    expected = reduced(op, inputs)[me]
    out = poisoned(dtype, 5)
    dist.reduce_scatter_tensor(out, inputs[me], op)
    same(out, expected, "reduce_scatter_tensor", dtype, op)
    out = poisoned(dtype, 5)
    dist.reduce_scatter(out, list(inputs[me]), op)
    same(out, expected, "reduce_scatter", dtype, op)
    several = [everybodys(dtype, size, salt=size) for size in (3, 100, 1)]
    mine = [inputs[me].clone() for inputs in several]
    dist.all_reduce_coalesced(mine, op)
    for x, inputs in zip(mine, several, strict=True):
        same(x, reduced(op, inputs), "all_reduce_coalesced", dtype, op)
for dtype, op in [(torch.float32, Op.BAND), (torch.bool, Op.AVG)]:
    error = refuses(unisono.errors.UnsupportedError, dist.all_reduce, poisoned(dtype, 4), op)
    assert error.expected, vars(error)
refuses(ValueError, dist.all_reduce, poisoned(torch.complex64, 4), Op.MAX)

scales = [0.5 + rank for rank in range(n)]
for dtype in (torch.float32, torch.float64) if ON == "cpu" else (torch.float32,):
    inputs = everybodys(dtype, 50)
    x = inputs[me].clone()
    dist.all_reduce(x, dist._make_nccl_premul_sum(scales[me]))
    same(x, reduced(Op.SUM, [x * scale for x, scale in zip(inputs, scales, strict=True)]), "premul_sum", dtype)

# Movement.
for dtype in MOVED:
    inputs = everybodys(dtype, 2, 3)
    for root in range(n):
        x = inputs[me].clone()
        dist.broadcast(x, root)
        same(x, inputs[root], "broadcast", dtype)
        outputs = [poisoned(dtype, 2, 3) for _ in range(n)] if me == root else None
        dist.gather(inputs[me], outputs, root)
        for out, x in zip(outputs or [], inputs, strict=False):
            same(out, x, "gather", dtype)
        out = poisoned(dtype, 2, 3)
        dist.scatter(out, inputs if me == root else None, root)
        same(out, inputs[me], "scatter", dtype)
    for is_async in (False, True):
        outputs = [poisoned(dtype, 2, 3) for _ in range(n)]
        work = dist.all_gather(outputs, inputs[me], async_op=is_async)
        if is_async:
            work.wait()
        for out, x in zip(outputs, inputs, strict=True):
            same(out, x, "all_gather", dtype)
    uneven = [data(rank, dtype, rank + 1, 2) for rank in range(n)]
    outputs = [torch.empty_like(x) for x in uneven]
    dist.all_gather(outputs, uneven[me])
    for out, x in zip(outputs, uneven, strict=True):
        same(out, x, "all_gather of parts that differ", dtype)
    out = poisoned(dtype, n, 2, 3)
    dist.all_gather_into_tensor(out, inputs[me])
    same(out, torch.stack(inputs), "all_gather_into_tensor", dtype)

    inputs = everybodys(dtype, 2 * n, 3)
    out = poisoned(dtype, 2 * n, 3)
    dist.all_to_all_single(out, inputs[me])
    same(out, torch.cat([x[2 * me : 2 * me + 2] for x in inputs]), "all_to_all_single", dtype)
    # Rank a sends (a + b) % 3 rows to b.
    rows = lambda a, b: (a + b) % 3
    mine = [data(me, dtype, rows(me, to), 4, salt=to) for to in range(n)]
    expected = [data(source, dtype, rows(source, me), 4, salt=me) for source in range(n)]
    out = torch.cat([torch.empty_like(x) for x in expected])
    splits = [rows(source, me) for source in range(n)], [rows(me, to) for to in range(n)]
    dist.all_to_all_single(out, torch.cat(mine), *splits)
    same(out, torch.cat(expected), "all_to_all_single with sizes", dtype)
    outputs = [torch.empty_like(x) for x in expected]
    dist.all_to_all(outputs, mine)
    for out, x in zip(outputs, expected, strict=True):
        same(out, x, "all_to_all", dtype)

    for size in (0, 1, 100_000):
        out, x = poisoned(dtype, size), data(me, dtype, size)
        if ON == "cpu":
            requests = [dist.isend(x, right, tag=3), dist.irecv(out, left, tag=3)]
        elif me % 2:  # in the stream of a GPU messages follow each other
            requests = [dist.isend(x, right, tag=3), dist.irecv(out, left, tag=3)]
        else:
            requests = [dist.irecv(out, left, tag=3), dist.isend(x, right, tag=3)]
        for request in requests:
            request.wait()
        same(out, data(left, dtype, size), "isend and irecv", dtype)
        out = poisoned(dtype, size)
        messages = [dist.P2POp(dist.isend, x, right), dist.P2POp(dist.irecv, out, left)]
        for request in dist.batch_isend_irecv(messages):
            request.wait()
        same(out, data(left, dtype, size), "batch_isend_irecv", dtype)
    if me == 0:
        dist.send(data(0, dtype, 9), 1)
    elif me == 1:
        out = poisoned(dtype, 9)
        assert dist.recv(out, 0) == 0
        same(out, data(0, dtype, 9), "recv", dtype)

if me == 0:
    found = {}
    for _ in range(n - 1):
        out = poisoned(torch.int64, 3)
        source = dist.recv(out)
        found[source] = out
    for source, out in found.items():
        same(out, data(source, torch.int64, 3), "recv from anybody")
    assert sorted(found) == list(range(1, n))
else:
    dist.send(data(me, torch.int64, 3), 0)

# Tensors that are empty, dense in another order, or with gaps.
x = torch.empty(0, device=ON)
dist.all_reduce(x)
outputs = [torch.empty(0, 3, device=ON) for _ in range(n)]
dist.all_gather(outputs, torch.empty(0, 3, device=ON))
inputs = everybodys(torch.float32, 3, 4)
x = inputs[me].clone().t()
dist.all_reduce(x)
same(x, reduced(Op.SUM, inputs).t(), "a transposed tensor")
x = inputs[me].clone().t()
dist.broadcast(x, 1)
same(x, inputs[1].t(), "a transposed tensor")
outputs = [torch.zeros(8, 3, device=ON)[::2] for _ in range(n)]
dist.all_gather(outputs, inputs[me].t())
for out, x in zip(outputs, inputs, strict=True):
    same(out, x.t(), "all_gather into tensors with gaps")
wide = torch.zeros(4, 4, device=ON)
error = refuses(unisono.errors.ArgumentError, dist.all_reduce, wide[:, ::2])
assert error.rank == me and not wide.any(), vars(error)
out = torch.zeros(4, 2, device=ON).t()
refuses(unisono.errors.ArgumentError, dist.reduce_scatter_tensor, out, torch.ones(2 * n, 4, device=ON))
refuses(unisono.errors.ArgumentError, dist.all_gather_into_tensor, torch.zeros(n, 3, device=ON)[:, :1], torch.ones(1, device=ON))
assert not out.any()
refuses(unisono.errors.ArgumentError, dist.reduce_scatter, torch.zeros(3, device=ON), [torch.ones(2, device=ON)] * n)
if me == 0:
    wrong = [torch.zeros(1, device=ON), torch.zeros(3, device=ON), *([torch.zeros(2, device=ON)] * (n - 2))]
    refuses(unisono.errors.ArgumentError, dist.gather, torch.ones(2, device=ON), wrong)
refuses(unisono.errors.ArgumentError, dist.all_reduce, torch.ones(2, 2, device=ON).to_sparse())
refuses(ValueError, dist.all_to_all_single, torch.zeros(n, device=ON), torch.ones(n, device=ON), [1] * n, [2] * n)

# Several started before one is waited for; a future; what follows on it.
tensors = [torch.full((100_000,), me + float(at), device=ON) for at in range(20)]
works = [dist.all_reduce(x, async_op=True) for x in tensors]
small = torch.ones(1, device=ON)
dist.all_reduce(small)
assert small == n
for work in works:
    assert work.wait()
for at, x in enumerate(tensors):
    assert (x == n * (n - 1) / 2 + n * at).all(), at
x = torch.ones(100_000, device=ON)
future = dist.all_reduce(x, async_op=True).get_future().then(lambda done: done.value()[0] / n)
assert (future.wait() == 1).all()
with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
    tensors = [torch.full((10,), float(at), device=ON) for at in range(3)]
    for x in tensors:
        dist.all_reduce(x)
manager.wait()
assert [x[0].item() for x in tensors] == [0, n, 2 * n]

# Objects and barriers.
everything = [None] * n
dist.all_gather_object(everything, {"rank": me, "text": "x" * 1000 * me})
assert [got["rank"] for got in everything] == list(range(n)) and len(everything[-1]["text"]) == 1000 * (n - 1)
objects = [me, "two"] if me == 1 else [None, None]
dist.broadcast_object_list(objects, 1)
assert objects == [1, "two"]
gathered = [None] * n if me == 0 else None
dist.gather_object(("from", me), gathered, 0)
assert gathered is None or gathered == [("from", rank) for rank in range(n)]
mine = [None]
dist.scatter_object_list(mine, [[rank] for rank in range(n)] if me == 0 else None, 0)
assert mine == [[me]]
dist.barrier()
dist.barrier(async_op=True).wait()
dist.monitored_barrier(timeout=timedelta(seconds=30))

# Groups: of some ranks, of one, and of all in another order.
group = dist.new_group([0, n - 1])
if me in (0, n - 1):
    x = torch.full((5,), me + 1.0, device=ON)
    dist.all_reduce(x, group=group)
    assert (x == n + 1).all()
    dist.broadcast(x, n - 1, group=group)
    dist.destroy_process_group(group)
alone = [dist.new_group([rank]) for rank in range(n)][me]
x = torch.full((5,), float(me), device=ON)
dist.all_reduce(x, dist.ReduceOp.AVG, group=alone)
assert (x == me).all()
everybody = dist.new_group(pg_options={"order": "rank"}, timeout=timedelta(seconds=20))
dist.all_reduce(x, group=everybody)
assert (x == n * (n - 1) / 2).all()

if ON != "cpu":
    torch.cuda.synchronize()
assert dist.get_backend() == "unisono"
dist.destroy_process_group()
print(f"rank {me} is done")
