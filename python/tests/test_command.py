"""The command: `python -m unisono` and `unisono` are the same, and start themselves again rightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import unisono

MODULE = [sys.executable, "-m", "unisono"]
SCRIPT = [str(Path(sys.executable).with_name("unisono"))]


def run(command, *arguments, **options):
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
def test_the_command_tells_its_version(command):
    done = run(command, "--version")
    assert (done.returncode, done.stdout) == (0, f"unisono {unisono.__version__}\n")


@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
def test_bench_starts_its_ranks_again_through_python(command, tmp_path):
    result = tmp_path / "result.json"
    done = run(command, "bench", "all_reduce", "--device", "host", "--sizes", "8,4KiB", f"--json={result}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 sizes verified, 0 wrong" in done.stdout
    assert json.loads(result.read_text())


def test_run_hands_on_the_exit_code():
    program = "import unisono, sys; rank = unisono.init(); rank.barrier(); sys.exit(3 * rank.rank)"
    done = run(MODULE, "run", "-n", "2", "--", sys.executable, "-c", program)
    assert done.returncode == 3, done.stdout + done.stderr


def test_a_wrong_command_line_is_2():
    assert run(MODULE, "bensch").returncode == 2


def test_warnings_of_the_library_reach_standard_error():
    program = "import unisono; unisono.Communicator.threads(1)"
    done = run([sys.executable], "-c", program, env={**os.environ, "UNISONO_TIMEOT": "1s"})
    assert "UNISONO_TIMEOUT" in done.stderr and done.returncode == 0
    quiet = run([sys.executable], "-c", program, env={**os.environ, "UNISONO_TIMEOT": "1s", "UNISONO_LOG": "error"})
    assert quiet.stderr == ""
