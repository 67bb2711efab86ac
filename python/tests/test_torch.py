"""The backend of `torch.distributed`. Needs torch 2.11 or later, which `cargo xtask torch` brings."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

import unisono

HERE = Path(__file__).parent
NEEDS = "SKIPPED: torch 2.11 or later is not here; `cargo xtask torch` brings it"
torch = pytest.importorskip("torch", minversion="2.11", reason=NEEDS)
dist = pytest.importorskip("torch.distributed", reason=NEEDS)

SPAWN = multiprocessing.get_context("spawn")
SUITE = [line.split() for line in (HERE / "torch_suite.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_method_against_the_arithmetic_of_torch(run_job, ranks):
    done = run_job("torch_collectives", ranks)
    assert done.stdout.count("is done") == ranks, done.stdout + done.stderr


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_equals_that_of_one_process_with_all_data(run_job, ranks):
    done = run_job("torch_training", ranks)
    for what in ("DDP is right", "FSDP2 is right", "DTensor is right", "functional collectives are right"):
        assert done.stdout.count(what) == ranks, done.stdout + done.stderr


KINDS = ["all_reduce", "async", "future", "recv", "recv from anybody", "barrier", "object", "training"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_killed_is_named_on_the_others_within_a_second(run_job, tmp_path, kind):
    done = run_job("torch_death", 3, kind, str(tmp_path / "when"), ok=False)
    assert done.returncode == 137
    for rank in (0, 2):
        assert f"rank {rank} knew after 0." in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("played", ["gloo", "mpi"])
def test_the_tests_that_torch_has_for_its_own_backends(played):
    is_late = torch.__version__ >= (2, 14)
    names = [name for player, name, *until in SUITE if player == played and not (until and is_late)]
    program = [sys.executable, "-W", "ignore", str(HERE / "jobs" / "torch_suite.py"), played, *names]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1200)
    # Of another version of torch, some are not there.
    outcomes = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith("test_"))
    wrong = {name: outcome for name in names if (outcome := outcomes.get(name)) not in ("passed", "not there")}
    assert not wrong, f"{wrong}\n{done.stderr[-5000:]}"
    assert list(outcomes.values()).count("passed") > 40


def test_groups_of_several_backends(run_job, tmp_path):
    assert run_job("torch_mixed", 2, str(tmp_path)).stdout.count("done") == 2


def meet(path, rank, over, results):
    import unisono.torch  # noqa: F401

    dist.init_process_group("unisono", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=2))
    x = torch.full((3,), rank + 1.0)
    dist.all_reduce(x)
    told = x.tolist()
    if rank == 0:
        try:
            dist.barrier()
        except unisono.errors.TimeoutError as error:
            told = (told, error.missing, 2 <= error.waited_ms / 1000 < 3)
    else:
        over.wait(30)
    results.put((rank, told))


def test_processes_of_multiprocessing_meet_in_a_file_and_the_timeout_of_the_group_is_the_deadline(tmp_path):
    results, over = SPAWN.Queue(), SPAWN.Event()
    processes = [SPAWN.Process(target=meet, args=(tmp_path / "store", rank, over, results)) for rank in range(2)]
    for process in processes:
        process.start()
    rank, (told, missing, in_time) = results.get(timeout=60)
    over.set()
    assert (rank, told, in_time) == (0, [3.0] * 3, True) and "rank 1" in missing[0]
    assert results.get(timeout=60) == (1, [3.0] * 3)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_newer_versions_of_torch_find_the_backend_by_themselves():
    if torch.__version__ < (2, 14):
        pytest.skip("SKIPPED: torch looks for backends from 2.14 on")
    program = (
        "import torch.distributed as dist\n"
        "dist.init_process_group('unisono', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.barrier()\n"
        "print(dist.get_backend())\n"
        "dist.destroy_process_group()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "unisono\n"), done.stderr


def test_the_tensors_in_the_value_of_a_future_are_found_as_torch_finds_them():
    import unisono.torch  # noqa: F401

    find = torch._jit_internal._extract_tensors
    x, y = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    values = [[x, y], [], [x, None], [[x], [y]], {"a": x, "b": [y]}, (x, y), x, 3]
    found = [[id(tensor) for tensor in find(value)] for value in values]
    assert found == [[id(tensor) for tensor in find.args[0](value)] for value in values]
    assert found[0] == found[3] == [id(x), id(y)] and found[7] == []


def test_a_backend_that_is_registered_twice_is_there_once_and_options_are_looked_at():
    import unisono.torch

    unisono.torch.register()
    assert dist.Backend.UNISONO == "unisono"
    store = dist.HashStore()
    with pytest.raises(TypeError, match="a dict of options"):
        dist.init_process_group("unisono", store=store, rank=0, world_size=1, pg_options=3)
    with pytest.raises(TypeError, match="no option `odor`"):
        dist.init_process_group("unisono", store=store, rank=0, world_size=1, pg_options={"odor": "rank"})
    dist.init_process_group("unisono", store=store, rank=0, world_size=1, pg_options={"order": "rank"})
    x = torch.ones(4)
    dist.all_reduce(x, async_op=True).wait()
    assert x.tolist() == [1, 1, 1, 1] and dist.get_backend() == "unisono"
    dist.destroy_process_group()
