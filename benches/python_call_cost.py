"""What a call from Python costs above the same call from Rust: an all-reduce of an 8 KiB numpy array, between two processes.

    pip install numpy && pip install .        # a release build of the package
    python benches/python_call_cost.py [--bytes 8192] [--turns 7]
    python benches/python_call_cost.py --device cuda          # what a call costs the host, for tensors of torch

Both are measured in turns, with each rank on a processor of its own, from one array to another: 20,000 calls, each timed, of which the slower
rank's time counts; printed is their median. Rust is `unisono bench`. Before that, calls of a world of one rank, which wait for nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

import unisono

COMMAND = [sys.executable, "-m", "unisono"]
BATCH, CALLS = 100, 20_000


def of_python(bytes_: int) -> float:
    """One turn of Python, under `unisono run`: microseconds of a call."""
    arguments = [sys.executable, __file__, "--rank", "--bytes", str(bytes_)]
    run = [*COMMAND, "run", "-n", "2", "--bind", "--", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "{" in line)
    return json.loads(line[line.index("{") :])["p50"]


def of_rust(bytes_: int) -> float:
    """One turn of Rust, by `unisono bench`."""
    with tempfile.NamedTemporaryFile() as file:
        sizes = ["--sizes", str(bytes_), "--device", "host", f"--json={file.name}", "-q"]
        subprocess.run([*COMMAND, "bench", "all_reduce", *sizes], check=True, stdout=subprocess.DEVNULL)
        with open(file.name) as result:
            return json.load(result)["results"][0]["p50_us"]


def rank(bytes_: int) -> None:
    """A rank of Python: each call is timed on both ranks, and the slower one counts."""
    with unisono.init() as world:
        x, out = np.ones(bytes_ // 4, dtype=np.float32), np.zeros(bytes_ // 4, dtype=np.float32)
        all_reduce, now, times = world.all_reduce, time.perf_counter_ns, np.zeros(CALLS)
        for call in range(-CALLS // 10, CALLS):
            begin = now()
            all_reduce(x, out=out)
            times[call] = now() - begin
        assert (out == 2).all()
        world.all_reduce(times, "max")
        if world.rank == 0:
            print(json.dumps({"p50": float(np.median(times)) / 1e3}))


def rank_on_gpu(bytes_: int) -> None:
    """A rank on a GPU: host time of calls that are enqueued, on the current stream of torch."""
    import torch

    device = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(device)
    with unisono.init(device=device) as world:
        x = torch.ones(bytes_ // 4, device=f"cuda:{device}")
        calls = {
            "all_reduce": lambda: world.all_reduce(x),
            "all_reduce, async_op": lambda: world.all_reduce(x, async_op=True),
            "torch: x.add_(0)": lambda: x.add_(0),
        }
        for name, call in calls.items():
            times = []
            for _ in range(200):
                torch.cuda.synchronize()
                world.barrier()
                begin = time.perf_counter_ns()
                for _ in range(BATCH):
                    call()
                times.append((time.perf_counter_ns() - begin) / BATCH)
            if world.rank == 0:
                print(f"host time of {name:22} {statistics.median(times):8.0f} ns")


def alone(bytes_: int) -> dict[str, float]:
    """Nanoseconds of calls that wait for nobody."""
    world = unisono.Communicator.threads(1)[0]
    x, out = np.ones(bytes_ // 4, dtype=np.float32), np.ones(bytes_ // 4, dtype=np.float32)
    calls = {
        "barrier": lambda: world.barrier(),
        "all_reduce": lambda: world.all_reduce(x),
        "all_reduce with out": lambda: world.all_reduce(x, out=out),
        "an empty function": lambda: None,
    }
    times = {}
    for name, call in calls.items():
        measured = []
        for _ in range(200):
            begin = time.perf_counter_ns()
            for _ in range(BATCH):
                call()
            measured.append((time.perf_counter_ns() - begin) / BATCH)
        times[name] = statistics.median(measured)
    return times


def main() -> object:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", choices=["host", "cuda"], default="host")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank_on_gpu(options.bytes) if options.device == "cuda" else rank(options.bytes)
    if options.device == "cuda":
        arguments = [sys.executable, __file__, "--rank", "--device", "cuda", "--bytes", str(options.bytes)]
        return subprocess.run([*COMMAND, "run", "-n", "2", "--bind", "--", *arguments], check=True)
    for name, nanoseconds in alone(options.bytes).items():
        print(f"alone: {name:22} {nanoseconds:8.0f} ns")
    python, rust = [], []
    for turn in range(options.turns):
        python.append(of_python(options.bytes))
        rust.append(of_rust(options.bytes))
        print(f"turn {turn + 1}: Python {python[-1]:.2f} µs, Rust {rust[-1]:.2f} µs")
    difference = statistics.median(python) - statistics.median(rust)
    print(f"all_reduce of {options.bytes} bytes, 2 processes: Python {statistics.median(python):.2f} µs, "
          f"Rust {statistics.median(rust):.2f} µs, {difference:.2f} µs above")  # fmt: skip


if __name__ == "__main__":
    main()
