#!/usr/bin/env python3
"""Measures unisono beside MPI libraries and Gloo in one run, alternating, and writes a table and the raw figures.

    cargo build --release
    python3 benches/peers/compare.py --rounds 5 --ranks 2 --out docs/cpu-results/NAME
    python3 benches/peers/compare.py --operations reduce gather --sizes 8 4096 --time-ms 50 --rounds 2

Needs nothing but Python; uses whichever of Open MPI, MPICH (Debian: openmpi-bin libopenmpi-dev mpich) and torch with Gloo
are installed. What a library does not have is left out.
Bytes are those of one part: what each rank contributes, or gets where it contributes a part to every rank.
Every round runs each library once, in turn; a figure is the median over rounds of the p50 of each, so that drift of a
shared machine meets all of them. The ratio is the median over rounds of the ratios within a round.
"""
import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
OPERATIONS = [
    "all_reduce", "broadcast", "all_gather", "reduce", "reduce_scatter", "gather", "scatter", "all_to_all", "send_recv",
    "barrier",
]
SIZES = [8, 64, 512, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 512 << 10, 4 << 20, 16 << 20, 64 << 20]
GLOO = "Gloo"
MPIS = {"Open MPI": ("mpicc.openmpi", "mpirun.openmpi"), "MPICH": ("mpicc.mpich", "mpirun.mpich")}


def found(program):
    return subprocess.run(["which", program], capture_output=True).returncode == 0


def peers(folder, options):
    """The other libraries that are here and wanted, each as a command that prints a JSON line per size."""
    commands = {}
    for name, (compiler, launcher) in MPIS.items():
        if name not in options.peers or not (found(compiler) and found(launcher)):
            continue
        binary = os.path.join(folder, compiler)
        subprocess.run([compiler, "-O2", "-o", binary, os.path.join(HERE, "mpi_collectives.c")], check=True)
        flags = ["--allow-run-as-root", "--oversubscribe"] if name == "Open MPI" else []
        settings = ["-t", str(options.time_ms), "-s", ",".join(map(str, options.sizes))]
        commands[name] = [launcher, *flags, "-n", str(options.ranks), binary, *settings, *options.operations]
    if GLOO in options.peers and importlib.util.find_spec("torch"):
        settings = ["-n", str(options.ranks), "-t", str(options.time_ms), "-s", ",".join(map(str, options.sizes))]
        commands[GLOO] = [sys.executable, os.path.join(HERE, "gloo_collectives.py"), *settings, *options.operations]
    return commands


def measure_peer(command):
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    figures = [json.loads(line) for line in lines if line.startswith("{")]
    return {(figure["operation"], figure["bytes"]): figure["p50_us"] for figure in figures}


def measure_unisono(options, extra):
    settings = ["--time", f"{options.time_ms}ms", "--sizes", ",".join(map(str, options.sizes))]
    command = [options.unisono, "bench", *options.operations, "-n", str(options.ranks), "--json", *settings, *extra]
    run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert all(result["wrong"] == 0 for result in run["results"])
    return {(result["operation"], result["bytes"]): result["p50_us"] for result in run["results"]}, run


def shown(us):
    return f"{us:.2f} µs" if us < 10 else f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"


def size(count):
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count >> shift} {unit}"
    return f"{count} B"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--out", help="writes OUT.json and OUT.md")
    arguments.add_argument("--unisono", default=os.path.join(ROOT, "target", "release", "unisono"))
    arguments.add_argument("--peers", nargs="+", default=[*MPIS, GLOO], choices=[*MPIS, GLOO])
    arguments.add_argument("--operations", nargs="+", default=OPERATIONS[:3], choices=OPERATIONS, help="default: the first three")
    arguments.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="bytes of one part")
    arguments.add_argument("--time-ms", type=int, default=250, help="how long to measure each size")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = peers(folder, options)
        rounds, run = [], None
        for number in range(options.rounds):
            figures = {}
            figures["unisono"], run = measure_unisono(options, [])
            figures["unisono, windows"], _ = measure_unisono(options, ["--windows"])
            for name, command in commands.items():
                figures[name] = measure_peer(command)
            rounds.append(figures)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    names = ["unisono", "unisono, windows", *commands]
    text = []
    for operation in options.operations:
        what = ", a round trip" if operation == "send_recv" else ""
        text.append(f"\n**{operation}**{what}, f32, {options.ranks} ranks, p50\n")
        text.append("| bytes of a part | " + " | ".join(names) + " | unisono / best other (min – max over rounds) |")
        text.append("| --- |" + " --- |" * (len(names) + 1))
        for _, count in sorted(key for key in rounds[0]["unisono"] if key[0] == operation):
            key = (operation, count)
            others = [name for name in commands if all(key in figures[name] for figures in rounds)]
            cells = [
                "–" if name in commands and name not in others else shown(statistics.median(one[name][key] for one in rounds))
                for name in names
            ]
            ratios = [figures["unisono"][key] / min(figures[name][key] for name in others) for figures in rounds if others]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})" if ratios else "–"
            text.append(f"| {size(count) if count else '–'} | " + " | ".join(cells) + f" | {spread} |")
    table = "\n".join(text)
    print(table)
    if options.out:
        machine = run["machine"]
        raw = {
            "command": " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": {**machine, "system": platform.platform()},
            "rounds": [{name: [[*key, us] for key, us in values.items()] for name, values in one.items()} for one in rounds],
        }
        with open(options.out + ".json", "w") as file:
            json.dump(raw, file)
        with open(options.out + ".md", "w") as file:
            file.write(table.lstrip() + "\n")


main()
