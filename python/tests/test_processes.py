"""Ranks that are processes: started by `unisono run`, and by multiprocessing."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time

import numpy as np
import pytest

import unisono

SPAWN = multiprocessing.get_context("spawn")


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_operation_between_processes(run_job, ranks):
    done = run_job("operations", ranks)
    assert done.stdout.count("is done") == ranks


def test_a_death_names_the_rank_and_the_others_go_on(run_job):
    done = run_job("death", 3, ok=False)
    assert done.returncode != 0
    assert "went on 0 of 2 [2.0]" in done.stdout and "went on 1 of 2 [2.0]" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["collective", "work", "message", "split", "group"])
def test_ctrl_c_ends_a_wait_and_tells_the_others(run_job, kind):
    done = run_job("interrupt", 2, kind)
    assert "interrupted" in done.stdout, done.stdout + done.stderr
    assert "told: 0 a signal ended" in done.stdout, done.stdout + done.stderr


def by_id(unique_id, rank, results):
    with unisono.Communicator.from_unique_id(unique_id, rank, 2, timeout=60) as communicator:
        results.put((rank, communicator.all_reduce(np.array([rank + 1])).tolist()))


def test_processes_of_multiprocessing_meet_by_a_unique_id_that_was_pickled():
    results = SPAWN.Queue()
    with unisono.StoreServer() as server:
        processes = [SPAWN.Process(target=by_id, args=(server.unique_id, rank, results)) for rank in range(2)]
        for process in processes:
            process.start()
        got = sorted(results.get(timeout=60) for _ in processes)
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    assert got == [(0, [3]), (1, [3])]


def by_file(path, rank, world_size, results):
    try:
        store = unisono.FileStore(path)
        with unisono.Communicator.from_store(store, rank, world_size, init_timeout=20):
            results.put("met")
    except unisono.UnisonoError as error:
        results.put(f"{type(error).__name__}: {error}")


def test_a_rank_of_another_world_is_refused_with_both_named(tmp_path):
    results = SPAWN.Queue()
    worlds = [(0, 2), (1, 3)]
    processes = [SPAWN.Process(target=by_file, args=(tmp_path / "store", *world, results)) for world in worlds]
    processes[0].start()
    time.sleep(1)
    processes[1].start()
    first = results.get(timeout=60)
    assert first.startswith("DisagreementError: world size differs: rank "), first
    for process in processes:
        process.terminate()
        process.join(60)


ENDLESS = {
    "nobody comes": "unisono.Communicator.from_store(unisono.MemoryStore(), 0, 2, init_timeout=60)",
    "a key that never appears": "unisono.MemoryStore().get('key', timeout=60)",
    "a signal that never comes": "unisono.Communicator.threads(1)[0].symmetric_memory(1).wait_signal(0, 1, timeout=60)",
    "another thread has the communicator": (
        "rank, other = unisono.Communicator.threads(2)\n"
        "thread = threading.Thread(target=rank.barrier, daemon=True)\n"
        "thread.start()\n"
        "while rank.state()[1] is None: pass\n"
        "rank.barrier()"
    ),
    "ranks that are threads": "unisono.on_threads(2, lambda rank: rank.recv(bytearray(1), 1 - rank.rank))",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_program_that_waits_is_ended_by_ctrl_c(case):
    # A shell has the programs in its background ignore Ctrl-C, and so those that they start.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program = f"{heard}import threading, unisono\nprint('ready', flush=True)\n{ENDLESS[case]}\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0 and errors.rstrip().endswith("KeyboardInterrupt"), errors
