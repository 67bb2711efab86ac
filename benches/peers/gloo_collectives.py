#!/usr/bin/env python3
"""The same measurement as `unisono bench`, for Gloo by torch.distributed: back-to-back calls in batches (1,000 calls
below 4 KiB), f32 sum; of each batch the slowest rank's time counts; percentiles over batches. Bytes are those of one part.
send_recv is a round trip between ranks 0 and 1, 2 and 3, and so on. One JSON line per size; operations that this torch's
Gloo does not have are left out. Starts its own ranks, which meet over loopback.

    python3 gloo_collectives.py -n 2 [-t MILLISECONDS per size] [-s BYTES,BYTES…] [OPERATION…]
"""
import argparse
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def round_trip(rank, ranks, source, target):
    partner = rank ^ 1
    if partner >= ranks:
        return
    if rank < partner:
        dist.send(source, partner)
        dist.recv(target, partner)
    else:
        dist.recv(target, partner)
        dist.send(target, partner)


def operation_of(name, rank, ranks, count):
    """One call, always on the same buffers, of zeros: torch sums in place."""
    one, all_parts = torch.zeros(count), torch.zeros(count * ranks)
    parts, others, is_root = list(all_parts.chunk(ranks)) if count else [], torch.zeros(count * ranks), rank == 0
    return {
        "all_reduce": lambda: dist.all_reduce(one),
        "broadcast": lambda: dist.broadcast(one, 0),
        "all_gather": lambda: dist.all_gather_into_tensor(all_parts, one),
        "reduce": lambda: dist.reduce(one, 0),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(one, all_parts),
        "gather": lambda: dist.gather(one, parts if is_root else None, 0),
        "scatter": lambda: dist.scatter(one, parts if is_root else None, 0),
        "all_to_all": lambda: dist.all_to_all_single(others, all_parts),
        "send_recv": lambda: round_trip(rank, ranks, one, one),
        "barrier": dist.barrier,
    }[name]


def batch_us(call, calls, ranks):
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    slowest = torch.tensor([(time.perf_counter() - start) * 1e6 / calls], dtype=torch.float64)
    if ranks > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def run(rank, options, meeting):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=options.ranks)
    for name in options.operations:
        for size in [0] if name == "barrier" else options.sizes:
            call = operation_of(name, rank, options.ranks, size // 4)
            calls = 1 if size >= 4096 else 1000
            try:
                call()
            except (NotImplementedError, RuntimeError, ValueError):
                break  # Every rank finds out by itself.
            first = batch_us(call, calls, options.ranks)
            batches = max(5, min(20_000, int(options.time_ms * 1000 / (first * calls))))
            times = sorted(batch_us(call, calls, options.ranks) for _ in range(batches))
            if rank == 0:
                p50, p99 = times[batches // 2], times[min(batches * 99 // 100, batches - 1)]
                print(json.dumps({"operation": name, "bytes": size, "p50_us": p50, "p99_us": p99}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("-n", dest="ranks", type=int, default=2)
    arguments.add_argument("-t", dest="time_ms", type=int, default=250)
    arguments.add_argument("-s", dest="sizes", type=lambda text: [int(size) for size in text.split(",")], default=[8, 4096])
    arguments.add_argument("operations", nargs="*", default=["all_reduce"])
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run, (options, os.path.join(folder, "meeting")), options.ranks)


if __name__ == "__main__":
    main()
