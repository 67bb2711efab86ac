"""The backend "unisono" beside "nccl" on GPUs: collectives give the same, training steps with DDP and FSDP2 give the same within rounding,
graphs can be captured, and how long steps and calls take.

    torchrun --nproc-per-node N torch_gpu.py [--json FILE] [--steps 20] [--brief]

With --brief only streams, graphs, and how long calls take.
Rank 0 prints the times as JSON. Times of a step are medians over all steps of all turns, in which the backends alternate. NCCL is measured
without NVLink's multicast, unless NCCL_NVLS_ENABLE says otherwise.
"""

import argparse
import copy
import json
import os
import statistics
import threading
import time
from datetime import timedelta

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import unisono.torch

parser = argparse.ArgumentParser()
parser.add_argument("--json")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--brief", action="store_true")
options = parser.parse_args()

here = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
torch.cuda.set_device(here)
dist.init_process_group("unisono", timeout=timedelta(seconds=60))
me, n = dist.get_rank(), dist.get_world_size()
can_nccl = n <= torch.cuda.device_count()  # NCCL has one rank on a GPU
groups = {"unisono": dist.group.WORLD}
if can_nccl:
    groups["nccl"] = dist.new_group(backend="nccl")
Op = dist.ReduceOp


def say(*words):
    if me == 0:
        print(*words, flush=True)


def both(call, *inputs):
    """What `call` gives on each backend, from equal inputs."""
    results = []
    for group in groups.values():
        given = [x.clone() for x in inputs]
        results.append(call(group, *given))
    return results


def agree(results, *what, exact=False):
    for other in results[1:]:
        wide = [x.double() for x in (results[0], other)]
        if exact:
            assert torch.equal(*wide), what
        else:
            tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4}.get(results[0].dtype, 1e-9)
            torch.testing.assert_close(*wide, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def all_reduce(op):
    def call(group, x):
        dist.all_reduce(x, op, group=group)
        return x

    return call


def reduce_scatter(op):
    def call(group, x):
        out = x.new_empty(x.numel() // n)
        dist.reduce_scatter_tensor(out, x, op, group=group)
        return out

    return call


def all_gather(group, x):
    out = x.new_empty(n * x.numel())
    dist.all_gather_into_tensor(out, x, group=group, async_op=True).wait()
    return out


def all_to_all(group, x):
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def broadcast(group, x):
    dist.broadcast(x, n - 1, group=group)
    return x


def exchange(group, x):
    out = torch.empty_like(x)
    to, source = (me + 1) % n, (me - 1) % n
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, out, source, group)]):
        work.wait()
    return out


def gathered_list(group, x):
    outputs = [torch.empty_like(x) for _ in range(n)]
    dist.all_gather(outputs, x, group=group, async_op=True).wait()
    return torch.cat(outputs)


# Collectives.
torch.manual_seed(100 + me)
for dtype in () if options.brief else (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64):
    for size in (1, 1000, 1 << 20, (6 << 20) + 3):
        size *= n
        x = torch.randint(0, 100, (size,), device=here).to(dtype) if not dtype.is_floating_point else torch.randn(size, device=here).to(dtype)
        exact = not dtype.is_floating_point
        for op in (Op.SUM, Op.MAX):
            agree(both(all_reduce(op), x), "all_reduce", dtype, size, op, exact=exact or op != Op.SUM)
            agree(both(reduce_scatter(op), x), "reduce_scatter_tensor", dtype, size, op, exact=exact or op != Op.SUM)
        if dtype.is_floating_point:
            agree(both(all_reduce(Op.AVG), x), "all_reduce", dtype, size, "avg")
        for call in (all_gather, all_to_all, broadcast, exchange, gathered_list):
            agree(both(call, x), call.__name__, dtype, size, exact=True)
if not options.brief:
    say("collectives agree")

# The order of streams: inputs that are still being made, results that are used at once, and memory that goes back at once.
total = n * (n + 1) / 2
for turn in range(100):
    x = torch.ones(4 << 20, device=here)
    dist.all_reduce(x, async_op=True)  # nobody waits
    del x
    fresh = torch.full((4 << 20,), -1.0, device=here)
    x = torch.full((4 << 20,), 1.0, device=here)
    for _ in range(20):
        x = x * 1.0
    x *= me + 1.0
    work = dist.all_reduce(x, async_op=True)
    beside = torch.ones(1 << 20, device=here).cumsum(0)
    work.wait()
    y = x * 2
    del x, work
    torch.full((4 << 20,), -1.0, device=here)
    outputs = [torch.empty(1 << 18, device=here) for _ in range(n)]
    dist.all_gather(outputs, y[: 1 << 18], async_op=True)  # nobody waits
    del outputs
    torch.full((n << 18,), -1.0, device=here)
    assert (y == 2 * total).all() and beside[-1] == 1 << 20 and (fresh == -1).all(), turn
side = torch.cuda.Stream()
# Several in flight, waited for in another order, by another stream and by another thread; some works outlive their call.
works = []
for turn in range(100):
    parts = [torch.full((1 << 16,), me + 1.0 + at, device=here) for at in range(8)]
    works = works[-5:] + [dist.all_reduce(part, async_op=True) for part in parts]
    with torch.cuda.stream(side):
        works[-5].wait()
        early = parts[0] + parts[3]
    thread = threading.Thread(target=lambda last=works[-1]: (torch.cuda.set_device(here), last.wait()))
    thread.start()
    thread.join()  # its current stream is this thread's too, the default one
    assert all((part == total + n * at).all() for at, part in enumerate(parts)), turn
    torch.cuda.current_stream().wait_stream(side)
    assert (early == 2 * total + 3 * n).all(), turn
    assert all(work.is_completed() and work.exception() is None for work in works), turn
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    x = torch.ones(1 << 20, device=here)
    future = dist.all_reduce(x, async_op=True).get_future().then(lambda done: done.value()[0] + 1)
    assert (future.wait() == n + 1).all()
torch.cuda.current_stream().wait_stream(side)
dist.barrier()
say("streams are in order")

# Graphs, with a call in the current stream and with one beside it.
for is_async in (False, True):
    x = torch.ones(1 << 16, device=here)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    x.fill_(1)
    with torch.cuda.graph(graph):
        work = dist.all_reduce(x, async_op=is_async)
        if is_async:
            work.wait()
        x *= 2
    work = None
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert (x == (2 * n) ** 3).all(), is_async
    del graph
# Two calls in flight, of which another stream of the capture joins one. Works of a graph are not complete, and nobody waits for them later.
graph, (x, y) = torch.cuda.CUDAGraph(), torch.ones(2, 1 << 16, device=here)
with torch.cuda.graph(graph):
    works = [dist.all_reduce(part, async_op=True) for part in (x, y)]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        works[0].wait()
        x *= 2
    works[1].wait()
    y *= 3
    torch.cuda.current_stream().wait_stream(side)
for turn in range(3):
    z = torch.full((1 << 16,), me + 1.0, device=here)
    assert works[turn % 2].wait() and not works[turn % 2].is_completed()
    work = dist.all_reduce(z, async_op=True)  # with events that no capture has recorded
    work.wait()
    assert (z == total).all() and work.is_completed()
    torch.cuda.synchronize()
    dist.barrier()
    graph.replay()
torch.cuda.synchronize()
assert (x == (2 * n) ** 3).all() and (y == (3 * n) ** 3).all()
del graph, works
say("graphs replay")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(256, 2048), *(Block(2048) for _ in range(4)), nn.Linear(2048, 16)).to(here)


def train(step, optimizer, inputs, targets):
    """The loss of the last step, and milliseconds of each."""
    times = []
    for x, y in zip(inputs, targets, strict=True):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(step(x), y)
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return float(loss.detach()), times


def with_ddp(replica, group):
    return DistributedDataParallel(replica, device_ids=[here.index], process_group=group)


def with_fsdp(replica, group):
    mesh = DeviceMesh.from_group(group, "cuda")
    for layer in replica:
        if isinstance(layer, Block):
            fully_shard(layer, mesh=mesh)
    return fully_shard(replica, mesh=mesh)


torch.manual_seed(200 + me)
inputs = torch.randn(options.steps, 64, 256, device=here)
targets = torch.randn(options.steps, 64, 16, device=here)
figures = {"ranks": n, "device": torch.cuda.get_device_name(), "torch": torch.__version__, "step_ms": {}, "call_us": {}}
figures["parameters"] = sum(parameter.numel() for parameter in model().parameters())
for name, prepare in () if options.brief else (("ddp", with_ddp), ("fsdp2", with_fsdp)):
    times, trained, losses = {backend: [] for backend in groups}, {}, {}
    for turn in range(3):
        for backend, group in groups.items():
            replica = model()
            step = prepare(replica, group)
            optimizer = torch.optim.SGD(step.parameters(), lr=0.01, momentum=0.9)
            losses[backend], took = train(step, optimizer, inputs, targets)
            times[backend] += took[3:]
            parameters = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in step.parameters()]
            trained[backend] = nn.utils.parameters_to_vector(parameters)
            low, high = trained[backend].clone(), trained[backend].clone()
            dist.all_reduce(low, Op.MIN)
            dist.all_reduce(high, Op.MAX)
            assert torch.equal(low, high), (name, backend, "ranks have other weights")
            del step, optimizer, replica, parameters
    if can_nccl:
        torch.testing.assert_close(trained["unisono"], trained["nccl"], rtol=1e-3, atol=1e-4)
    figures["step_ms"][name] = {backend: round(statistics.median(took), 3) for backend, took in times.items()}
    say(f"{name} trains alike; the last losses are {losses}")

# Calls one after the other in a stream, and the host's time for each.
for size in (8 << 10, 1 << 20, 64 << 20):
    x = torch.zeros(size // 4, device=here)
    of_size = figures["call_us"][str(size)] = {}
    for backend, group in groups.items():
        for kind in ("sync", "async", "future"):
            took, host = [], []
            for turn in range(7):
                torch.cuda.synchronize()
                dist.barrier()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                begin = time.perf_counter()
                for _ in range(50):
                    work = dist.all_reduce(x, group=group, async_op=kind != "sync")
                    if work is not None:
                        (work.get_future() if kind == "future" else work).wait()
                host.append((time.perf_counter() - begin) / 50 * 1e6)
                end.record()
                torch.cuda.synchronize()
                took.append(start.elapsed_time(end) / 50 * 1e3)
            of_size[f"{backend} {kind}"] = {"stream": round(statistics.median(took), 2), "host": round(statistics.median(host), 2)}

if me == 0:
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        with open(options.json, "w") as file:
            file.write(text + "\n")
torch.cuda.synchronize()
dist.barrier()
dist.destroy_process_group()
print(f"rank {me} is done")
