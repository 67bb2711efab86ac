"""What a call of `torch.distributed` costs through the backend "unisono", above the same call through a backend that does nothing.

    pip install torch && pip install .        # a release build of the package
    python benches/torch_call_cost.py [--bytes 8] [--turns 7] [--ranks 2] [--against gloo]
    python benches/torch_call_cost.py --device cuda           # host time of calls that are enqueued

Each rank is on a processor of its own, but with --against. All backends are measured in turns: 2,000 calls (200 above 1 MiB), each timed, of which the slower rank's time counts;
printed are medians of each turn, and of all. The promise is at most 6 µs above, on CPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time



def rank(bytes_: int, turns: int, on: str, against: list[str]) -> None:
    import torch
    import torch.distributed as dist

    import unisono.torch

    calls, warm = (200, 20) if bytes_ > 1 << 20 else (2_000, 200)
    if on == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("unisono")
    is_group = torch.__version__ < (2, 14)

    class Nothing(dist.ProcessGroup if is_group else torch._C._distributed_c10d.Backend):
        """Its calls return at once, and have moved nothing."""

        name = ""

        def allreduce(self, tensors, opts=None):
            return Done()

        def getBackendName(self):
            return "nothing"

        def setGroupName(self, name):
            self.name = name

        def getGroupName(self):
            return self.name

        setGroupDesc, getGroupDesc = setGroupName, getGroupName

    class Done(dist.Work):
        def wait(self, timeout=None):
            return True

    def create(store, me, size, timeout):
        return Nothing(me, size)

    dist.Backend.register_backend("nothing", create, devices=["cpu", "cuda"])
    x = torch.zeros(bytes_ // 4, device=on)
    others = {name: dist.new_group(backend=name) for name in ["nothing", *against]}
    groups = {"unisono": dist.group.WORLD, **others}
    now, times, medians = time.perf_counter_ns, torch.zeros(calls), {}
    for turn in range(turns):
        for name, group in groups.items():
            for is_async in (False, True):
                for call in range(-warm, calls):
                    if on == "cuda" and call % 100 == 0:
                        torch.cuda.synchronize()
                    begin = now()
                    work = dist.all_reduce(x, group=group, async_op=is_async)
                    if is_async:
                        work.wait()
                    times[call] = now() - begin
                dist.all_reduce(times, dist.ReduceOp.MAX)
                medians.setdefault(f"{name}, async_op" if is_async else name, []).append(float(times.median()) / 1e3)
        if dist.get_rank() == 0:
            print(f"turn {turn + 1}:", ", ".join(f"{name} {took[-1]:.2f} µs" for name, took in medians.items()))
    if dist.get_rank() == 0:
        for name, took in medians.items():
            print(f"{name:20} {statistics.median(took):10.2f} µs")
        ours, nothing = (statistics.median(medians[name]) for name in ("unisono", "nothing"))
        print(f"dist.all_reduce of {bytes_} bytes on {on}, {dist.get_world_size()} ranks, torch {torch.__version__}: "
              f"unisono {ours:.2f} µs, a backend that does nothing {nothing:.2f} µs, {ours - nothing:.2f} µs above")  # fmt: skip
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--against", nargs="*", default=[], metavar="BACKEND", help="backends of torch to be measured beside it")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.bytes, options.turns, options.device, options.against)
        return 0
    # Backends with threads of their own would have them on one processor with the program.
    bind = [] if options.against else ["--bind"]
    run = [sys.executable, "-m", "unisono", "run", "-n", str(options.ranks), *bind, "--"]
    return subprocess.run([*run, sys.executable, "-W", "ignore", *sys.argv, "--rank"]).returncode


if __name__ == "__main__":
    sys.exit(main())
