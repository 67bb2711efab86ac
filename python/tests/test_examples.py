"""The programs in `examples/` run; those that need more than is here are compiled, and run where it is."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_gpu import gpus

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = [sys.executable, "-m", "unisono", "run"]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [None, 1, 3])
def test_an_mlp_that_is_spread_over_the_ranks_trains_as_on_one(ranks):
    program = str(EXAMPLES / "tensor_parallel_mlp.py")
    launcher = [*RUN, "-n", str(ranks), "--"] if ranks else []
    assert f"{ranks or 4} ranks: loss " in run(*launcher, sys.executable, program)


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_mixture_of_experts_trains_as_on_one_rank(ranks):
    pytest.importorskip("torch", reason="SKIPPED: torch is not here")
    launcher = [*RUN, "-n", str(ranks), "--"] if ranks else []
    assert f"{ranks or 4} ranks on cpu: loss " in run(*launcher, sys.executable, str(EXAMPLES / "moe_training.py"))


def test_a_kernel_of_triton_reaches_all_gpus():
    program = EXAMPLES / "triton_symmetric.py"
    compile(program.read_text(), program.name, "exec")
    if importlib.util.find_spec("triton") is None or (count := gpus()) < 2:
        pytest.skip("SKIPPED: torch, Triton and two GPUs are not here")
    told = run(*RUN, "-n", str(count), "--", sys.executable, str(program))
    assert told.count("bit for bit") == count, told


def test_a_rust_program_runs_under_torchrun():
    program = os.environ.get("UNISONO_TEST_TORCHRUN")
    if program is None:
        pytest.skip("SKIPPED: UNISONO_TEST_TORCHRUN names no program; cargo xtask python builds it")
    launchers = [[], [*RUN, "-n", "3", "--"]]
    if importlib.util.find_spec("torch") is not None:
        launchers.append([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"])
    for launcher, ranks in zip(launchers, (4, 3, 2)):
        told = run(*launcher, program)
        assert told.count(f" of {ranks}: the largest eigenvalue is 3.99") == ranks, told


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_data_parallel_training_learns_and_all_ranks_have_the_same_weights(framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"SKIPPED: {framework} is not here")
    steps = {"numpy": "300", "torch": "61"}[framework]
    program = [sys.executable, "-W", "ignore", str(EXAMPLES / "train_ddp.py"), "--framework", framework, "--steps", steps]
    command = [sys.executable, "-m", "unisono", "run", "-n", "2", "--", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert sum(losses[-3:]) / 3 < losses[0] / 2, done.stdout
    assert "all ranks have the same weights: True" in done.stdout
