"""The Python examples, run as they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


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
