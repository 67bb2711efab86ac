"""Tensors of torch on GPUs. Needs torch and two GPUs; skipped where they are not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import unisono


def gpus() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    count = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("program", [["gpu"], ["torch_collectives", "cuda"]], ids=["arrays", "backend of torch"])
def test_tensors_on_gpus(run_job, program):
    if (count := gpus()) < 2:
        pytest.skip("SKIPPED: torch and two GPUs are not here")
    name, *arguments = program
    done = run_job(name, min(count, 4), *arguments)
    assert done.stdout.count("is done") == min(count, 4), done.stdout + done.stderr


def test_kernels_of_the_wheel_serve_where_no_compiler_is(run_job):
    if (count := gpus()) < 2:
        pytest.skip("SKIPPED: torch and two GPUs are not here")
    if not list((Path(unisono.__file__).parent / "kernels").glob("*.xz")):
        pytest.skip("SKIPPED: this wheel brings no kernels; cargo xtask wheel builds one that does")
    ranks = max(n for n in (2, 4, 8) if n <= count)
    done = run_job("prebuilt", ranks)
    assert done.stdout.count("is done") == ranks, done.stdout + done.stderr
