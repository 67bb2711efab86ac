"""What all tests share. They run against the installed package, as `cargo xtask test` installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# A wait that goes wrong is a failure of a test, not of the whole run.
os.environ.setdefault("UNISONO_TIMEOUT", "60s")


@pytest.fixture
def run_job():
    """Runs `jobs/NAME.py` under `unisono run`, and gives the finished process."""

    def run(name: str, ranks: int, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, str(HERE / "jobs" / f"{name}.py"), *arguments]
        command = [sys.executable, "-m", "unisono", "run", "-n", str(ranks), "--grace", "10", "--", *program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if ok:
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    return run
