"""Times what PyTorch's symmetric memory has of our operations on the GPUs here, bf16.

    python3 torch_symmetric.py [--json FILE] [--ranks N]

A process for each GPU. 20 calls follow each other, in a CUDA graph where the operation can be captured; of 15 rounds the median is
taken, and of all ranks the slowest. all_gather and reduce_scatter run beside the stream, which waits for each. Bytes are those of one part. NVLink's multicast stays off, as for every peer that is measured here.
"""

import argparse
import json
import os
import statistics
import sys

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import torch.multiprocessing as mp

CALLS, REPLAYS = 20, 15
SIZES = [1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20]


def one_shot(buffer, group):
    torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", group)


def two_shot(buffer, group):
    torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", group)


def all_gather(buffer, group):
    torch.ops._c10d_functional.wait_tensor(torch.ops.symm_mem._low_contention_all_gather(buffer, group))


def reduce_scatter(buffer, group):
    torch.ops._c10d_functional.wait_tensor(torch.ops.symm_mem._low_contention_reduce_scatter(buffer, "sum", group))


# Operation, torch's name, the call, whether its buffer has a part for each rank, whether it can be captured, the most bytes of a part.
OPERATIONS = [
    ("all_reduce", "one_shot_all_reduce", one_shot, False, True, 4 << 20),
    ("all_reduce", "two_shot_all_reduce_", two_shot, False, True, 1 << 30),
    ("all_gather", "_low_contention_all_gather", all_gather, False, False, 1 << 30),
    ("reduce_scatter", "_low_contention_reduce_scatter", reduce_scatter, True, False, 1 << 30),
]


def measure(call, is_captured):
    def calls():
        for _ in range(CALLS):
            call()

    calls()
    torch.cuda.synchronize()
    dist.barrier()
    replay_calls = calls
    if is_captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        replay_calls = graph.replay
    times = []
    for replay in range(REPLAYS + 2):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay_calls()
        end.record()
        torch.cuda.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end) * 1e3 / CALLS)
    slowest = torch.tensor(times, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def work(rank, ranks, port, results):
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    group = dist.group.WORLD.group_name
    for operation, name, call, has_parts, is_captured, most in OPERATIONS:
        for size in SIZES:
            if size > most:
                break
            count = size // 2 * (ranks if has_parts else 1)
            try:
                buffer = symm_mem.empty(count, dtype=torch.bfloat16, device=f"cuda:{rank}")
                symm_mem.rendezvous(buffer, group)
                buffer.fill_(0)
                us = measure(lambda: call(buffer, group), is_captured)
            except (RuntimeError, AttributeError) as error:
                # It fails alike on all ranks: a name that this version has not.
                if rank == 0:
                    print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
                break
            if rank == 0:
                bytes_moved = {"all_reduce": 2 * (ranks - 1) / ranks}.get(operation, ranks - 1) * size
                results.append({"operation": operation, "name": name, "bytes": size, "is_graph": is_captured, "us": us, "busbw": bytes_moved / us / 1e3})
                print(f"{operation:16}{name:34}{size:12}{us:12.2f} us{bytes_moved / us / 1e3:9.1f} GB/s", flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--port", type=int, default=29517)
    arguments = parser.parse_args()
    if torch.cuda.device_count() < max(2, arguments.ranks):
        sys.exit(f"expected {max(2, arguments.ranks)} GPUs, got {torch.cuda.device_count()}")
    with mp.Manager() as manager:
        results = manager.list()
        mp.spawn(work, (arguments.ranks, arguments.port, results), nprocs=arguments.ranks)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump({"torch": torch.__version__, "ranks": arguments.ranks, "results": list(results)}, file, indent=1)


if __name__ == "__main__":
    main()
