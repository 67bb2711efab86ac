"""Tensors of torch on GPUs. Needs torch and two GPUs; skipped where they are not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


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
