"""The module that engines call as `deep_ep`. Needs torch; skipped where it is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from test_gpu import gpus


def test_without_torch_the_import_says_so():
    program = "import sys; sys.modules['torch'] = None; import unisono; import unisono.deep_ep"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ImportError: unisono.deep_ep works on tensors of torch, which is not here" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_engine_finds_what_it_calls(run_job, tmp_path, ranks):
    pytest.importorskip("torch", reason="SKIPPED: torch is not here")
    done = run_job("deep_ep", ranks, str(tmp_path / "meet"), "cpu")
    assert done.stdout.count("is done") == ranks, done.stdout + done.stderr


def test_ranks_that_live_are_taken_in_again(run_job, tmp_path):
    pytest.importorskip("torch", reason="SKIPPED: torch is not here")
    done = run_job("deep_ep_mask", 4, str(tmp_path / "meet"), "cpu")
    assert done.stdout.count("is done") == 4, done.stdout + done.stderr


@pytest.mark.parametrize("before", ["masked", "unmasked"])
def test_a_killed_rank_is_left_out_of_low_latency_calls_for_good(run_job, tmp_path, before):
    pytest.importorskip("torch", reason="SKIPPED: torch is not here")
    done = run_job("deep_ep_death", 3, str(tmp_path / "meet"), before, ok=False)
    assert sorted(line for line in done.stdout.splitlines() if "went on" in line) == ["[0] went on 0", "[2] went on 2"], done.stdout + done.stderr


def test_an_engine_finds_it_on_gpus(run_job, tmp_path):
    if (count := gpus()) < 2:
        pytest.skip("SKIPPED: torch and two GPUs are not here")
    done = run_job("deep_ep", min(count, 8), str(tmp_path / "meet"), "cuda")
    assert done.stdout.count("is done") == min(count, 8), done.stdout + done.stderr
