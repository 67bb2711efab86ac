"""A rank on each GPU (or two on one), with tensors of torch: streams, works, graphs, symmetric memory, and what is refused."""

import gc
import os

import torch

import unisono

count = torch.cuda.device_count()
ordinal = int(os.environ["LOCAL_RANK"]) % count
here, other = torch.device("cuda", ordinal), torch.device("cuda", (ordinal + 1) % count)
torch.cuda.set_device(here)
rank = unisono.init(device=ordinal, timeout=60)
me, n = rank.rank, rank.world_size

# On the current stream, in place, for several types.
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn):
    x = torch.ones(10_000, device=here).to(dtype)
    assert rank.all_reduce(x) is x
    assert (x.float() == n).all(), dtype

# On another stream, with an array that nobody else keeps.
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    for size in (10, 1 << 20, 8 << 20):
        x = torch.full((size,), me + 1.0, device=here)
        out = rank.all_reduce(x, out=torch.zeros_like(x))
        del x
        gc.collect()
        torch.full((size,), -1.0, device=here)  # would take the memory, if it were free
        assert (out == n * (n + 1) / 2).all()

# Named, and as a work for which the current stream waits.
x = torch.ones(1 << 20, device=here)
side.wait_stream(torch.cuda.current_stream())
work = rank.all_reduce(x, stream=side, async_op=True)
assert work.wait() is x and (x == n).all() and work.is_completed()
torch.cuda.synchronize()

# Behind another stream: the current one, and one that is named. An array in the making is waited for.
other_side = torch.cuda.Stream()
for behind in (None, torch.cuda.current_stream(), other_side):
    with torch.cuda.stream(other_side if behind is other_side else torch.cuda.current_stream()):
        x = torch.full((8 << 20,), 1.0, device=here)
        for _ in range(20):
            x = x * 1.0
        work = rank.all_reduce(x, stream=(side, behind), async_op=True)
    assert work.wait() is x and (x == n).all()
torch.cuda.synchronize()

x = torch.arange(n, device=here) + n * me
expected = torch.tensor([n * r + me for r in range(n)], device=here)
assert torch.equal(rank.all_to_all(x, out=torch.empty_like(x)), expected)
right, left = (me + 1) % n, (me - 1) % n
with unisono.group():
    rank.send(torch.full((5,), me, device=here), right)
    rank.recv(got := torch.zeros(5, dtype=torch.int64, device=here), left)
assert (got == left).all()
# Those on a buffer of each device, between others.
x, y = torch.full((1000,), me + 1.0, device=here), torch.full((5,), float(me), device=here)
with unisono.group():
    rank.all_reduce_multi([x], "max")
    rank.send(x, right)
    rank.recv(theirs := torch.zeros(1000, device=here), left)
    rank.broadcast_multi([y], n - 1, streams=[torch.cuda.current_stream()])
assert (x == n).all() and (theirs == n).all() and (y == n - 1).all()
rank.barrier(stream=torch.cuda.current_stream())

# In a graph.
x = torch.ones(1000, device=here)
rank.all_reduce(x)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    rank.all_reduce(x)
for _ in range(3):
    graph.replay()
torch.cuda.synchronize()
assert (x == n**4).all()
x = torch.ones(1000, device=here)
graph = torch.cuda.CUDAGraph()
torch.cuda.synchronize()
rank.barrier()
with torch.cuda.graph(graph):
    work = rank.all_reduce(x, stream=(side, None), async_op=True)
    work.wait()
    x *= 2
assert work.wait() is x and not work.is_completed()
for _ in range(3):
    graph.replay()
torch.cuda.synchronize()
assert (x == (2 * n) ** 3).all()

# What is refused, with nothing written.
y = torch.ones(4, device=here)
for wrong, kind in [
    (lambda: rank.all_reduce(y, out=torch.zeros(4)), unisono.errors.PlaceError),
    (lambda: rank.all_reduce(torch.ones(4, 4, device=here)[:, ::2]), unisono.errors.ArgumentError),
    (lambda: rank.all_reduce(y, stream="soon"), unisono.errors.ArgumentError),
    (lambda: rank.all_reduce(y, stream=(side, "soon")), unisono.errors.ArgumentError),
    (lambda: rank.all_reduce(y, stream=(side, None, None)), unisono.errors.ArgumentError),
    (lambda: rank.all_reduce(torch.ones(4), stream=side), unisono.errors.PlaceError),
    *([(lambda: rank.all_reduce(torch.ones(4, device=other)), unisono.errors.PlaceError)] if other != here else []),
]:
    try:
        wrong()
    except kind as error:
        assert error.rank == me, error
    else:
        raise AssertionError(kind)
assert (y == 1).all()

# Symmetric memory: peers write into each other's copy by tensors.
memory = rank.symmetric_memory((n, 1000), torch.float32)
view = torch.from_dlpack(memory.local)
assert view.device == here and view.shape == (n, 1000) and not view.any()
torch.cuda.synchronize()
memory.barrier()
torch.from_dlpack(memory.view(right))[me] = me + 1.0
stream = torch.cuda.current_stream()
memory.signal(right, 0, 1, stream=stream)
memory.wait_signal(0, 1, timeout=30)
assert (view[left] == left + 1).all()
assert memory.local.__cuda_array_interface__["data"][0] == memory.addresses[me] == view.data_ptr()
torch.cuda.synchronize()
memory.barrier()
del view
memory.close()

# Windows and registered tensors: the call is on the memory where it lies, and on parts of it.
with rank.window((2, 1 << 20), torch.float32) as window:
    x = torch.from_dlpack(window)
    assert x.device == here and x.data_ptr() == window.address
    x[0], x[1] = me + 1.0, -1.0
    rank.all_reduce(x[0])
    assert (x[0] == n * (n + 1) / 2).all() and (x[1] == -1).all()
    part = rank.all_gather(x[0, :8], out=torch.zeros(n, 8, device=here))
    assert (part == n * (n + 1) / 2).all()
    torch.cuda.synchronize()
    del x
for size in (1000, 4 << 20):
    whole = torch.full((size,), me + 1.0, device=here)
    with rank.register(whole[8:]) as registered:
        assert registered.bytes == (size - 8) * 4
        rank.all_reduce(whole[8 : size - 4])
        torch.cuda.synchronize()
    assert (whole[8:-4] == n * (n + 1) / 2).all() and (whole[:8] == me + 1).all() and (whole[-4:] == me + 1).all()
with rank.window(100_000, torch.float32, memory="pinned") as window:
    x = window.lend().numpy()
    x[:] = me + 1
    rank.all_reduce(x, stream=torch.cuda.current_stream())
    window.lend()
    assert (x == n * (n + 1) / 2).all()
    rank.all_reduce(x)  # by the CPUs
    assert (x == n * n * (n + 1) / 2).all()
try:
    rank.register(torch.ones(4))
except unisono.errors.PlaceError as error:
    assert error.rank == me, error
else:
    raise AssertionError("memory of the host was registered")
rank.check()
rank.destroy()
print(f"rank {me} is done")
