"""The life of communicators: how they are made and end, what they tell, threads, timeouts, works and groups."""

from __future__ import annotations

import datetime
import gc
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest

import unisono
from unisono import errors


def test_a_closed_communicator_says_so_and_writes_nothing():
    rank = unisono.Communicator.threads(1)[0]
    rank.destroy()
    x = np.ones(2)
    calls = [
        (lambda: rank.all_reduce(x), "all_reduce"),
        (lambda: rank.all_reduce(x, async_op=True), "all_reduce"),
        (lambda: rank.barrier(), "barrier"),
        (lambda: rank.split(0), "split"),
        (lambda: rank.shrink(), "shrink"),
        (lambda: rank.destroy(), "destroy"),
        (lambda: rank.check(), "check"),
        (lambda: rank.symmetric_memory(3), "symmetric_memory"),
    ]
    for call, name in calls:
        with pytest.raises(errors.ClosedError) as caught:
            call()
        assert (caught.value.rank, caught.value.call) == (0, name) and isinstance(caught.value, ValueError)
    assert x.tolist() == [1.0, 1.0]
    rank.abort()
    assert "shared memory" in rank.explain()


def test_leaving_a_block_destroys_and_an_error_in_it_is_told_to_the_others():
    def main(rank):
        if rank.rank == 0:
            with pytest.raises(KeyError):
                with rank:
                    raise KeyError
        else:
            with pytest.raises(errors.PeerLeftError) as caught:
                rank.barrier()
            assert (caught.value.rank, caught.value.call) == (0, "barrier #1")
        with pytest.raises(errors.ClosedError):
            rank.barrier() if rank.rank == 0 else rank.destroy() or rank.barrier()

    with pytest.raises(errors.PeerLeftError):
        unisono.on_threads(2, main)


def test_a_timeout_of_one_call_names_who_is_missing():
    ranks = unisono.Communicator.threads(2)
    begun = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        ranks[0].barrier(timeout=0.1)
    assert isinstance(caught.value, errors.TimeoutError)
    assert caught.value.rank == 0 and "rank 1" in caught.value.missing[0] and 100 <= caught.value.waited_ms < 5000
    assert time.monotonic() - begun < 10
    with pytest.raises(errors.TimeoutError):  # the first cause stays
        ranks[0].all_reduce(np.ones(1))


@pytest.mark.parametrize("time_", [0, -1, float("nan"), "soon", datetime.timedelta(0)])
def test_what_is_no_time_is_refused(time_):
    with unisono.Communicator.threads(1)[0] as rank:
        with pytest.raises(errors.ArgumentError) as caught:
            rank.barrier(timeout=time_)
        assert caught.value.what == "timeout"
        rank.barrier(timeout=datetime.timedelta(seconds=5))
        rank.barrier(timeout=float("inf"))


def test_abort_from_another_thread_ends_a_wait_at_once():
    ranks = unisono.Communicator.threads(2)
    threading.Timer(0.1, ranks[0].abort, ("enough",)).start()
    with pytest.raises(errors.AbortedError) as caught:
        ranks[0].barrier()
    assert (caught.value.rank, caught.value.reason) == (0, "enough")
    with pytest.raises(errors.AbortedError):
        ranks[1].barrier()


def test_the_interpreter_runs_on_while_a_rank_waits():
    ranks = unisono.Communicator.threads(2)
    thread = threading.Thread(target=ranks[0].barrier)
    thread.start()
    count = 0
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        count += 1
    assert count > 1000
    assert ranks[0].state()[1] == "barrier #1 on rank 0"
    ranks[1].barrier()
    thread.join()
    assert ranks[0].state() == (1, None, None)


def test_two_threads_of_one_rank_take_turns():
    ranks = unisono.Communicator.threads(2)

    def work(rank, results):
        results.append(float(rank.all_reduce(np.ones(1))[0]))

    results: list[float] = []
    threads = [threading.Thread(target=work, args=(rank, results)) for rank in ranks for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2.0] * 10


def test_a_work_that_is_dropped_goes_on_and_its_array_goes_when_it_is_over():
    def main(rank):
        x = np.ones(100_000)
        gone = weakref.ref(x)
        rank.all_reduce(x, async_op=True)
        del x
        gc.collect()
        rank.barrier()
        assert rank.all_reduce(np.ones(1), async_op=True).wait().tolist() == [2.0]
        gc.collect()
        return gone() is None

    assert unisono.on_threads(2, main) == [True, True]


def test_works_report_failures():
    def main(rank):
        if rank.rank == 1:
            time.sleep(0.2)
            rank.abort("over")
            return
        work = rank.all_reduce(np.ones(1), async_op=True, timeout=30)
        assert work.is_completed() is False
        with pytest.raises(errors.AbortedError, match="over"):
            work.wait()
        with pytest.raises(errors.AbortedError):
            work.is_completed()

    unisono.on_threads(2, main)


def test_a_group_that_raises_posts_nothing():
    def main(rank):
        x = np.full(1, 5.0)
        with pytest.raises(KeyError):
            with unisono.group():
                rank.send(x, 1 - rank.rank)
                raise KeyError
        with pytest.raises(errors.ArgumentError):
            with unisono.group():
                rank.send(x, 1 - rank.rank, async_op=True)
        with pytest.raises(errors.ArgumentError, match="below 2|another rank"):
            with unisono.group():
                rank.send(x, 1 - rank.rank)
                rank.recv(x.copy(), 7)
        with unisono.group(), unisono.group():
            rank.send(np.full(1, float(rank.rank)), 1 - rank.rank)
            rank.recv(x, 1 - rank.rank)
        return x.tolist()

    assert unisono.on_threads(2, main) == [[1.0], [0.0]]


def test_operations_on_several_arrays_are_a_part_of_a_group():
    # Two ranks on one thread: alone, the first would wait for the second for ever.
    ranks = unisono.Communicator.threads(2)
    sums = [[np.full(3, 1.0 + 2 * me + at) for at in range(2)] for me in range(2)]
    filled, got = [[np.full(2, float(me))] for me in range(2)], np.zeros(1)
    with unisono.group():
        for rank, mine, one in zip(ranks, sums, filled):
            assert rank.all_reduce_multi(mine)[0] is mine[0]
            rank.broadcast_multi(one, 1)
        ranks[0].send(np.full(1, 5.0), 1)
        ranks[1].recv(got, 0)
        assert sums[1][1].tolist() == [4.0] * 3
    assert [x.tolist() for x in sum(sums, [])] == [[10.0] * 3] * 4
    assert [x.tolist() for x in sum(filled, [])] == [[1.0] * 2] * 2 and got == 5
    with pytest.raises(errors.ArgumentError, match="manner within a group should be that of the group, got timeout"):
        with unisono.group():
            ranks[0].all_reduce_multi(sums[0], timeout=3)


def test_options_are_checked():
    store = unisono.MemoryStore()
    make = lambda **options: unisono.Communicator.from_store(store, 0, 1, **options)
    with pytest.raises(TypeError, match="no option `timout`"):
        make(timout=3)
    with pytest.raises(errors.SettingError) as caught:
        make(order="random")
    assert caught.value.name == "UNISONO_ORDER"
    with pytest.raises(errors.ArgumentError, match="secret should be 32 bytes, got 3 bytes"):
        make(secret=b"abc")
    with pytest.raises(errors.MemberError):
        unisono.Communicator.from_store(store, 3, 2)
    with make(timeout=5, order="rank", generation=2, job="a", secret=bytes(32), recorder=False) as rank:
        assert rank.generation == 2


def test_a_device_that_is_not_there_is_an_error_of_its_own():
    with pytest.raises(errors.CudaError) as caught:
        unisono.Communicator.from_store(unisono.MemoryStore(), 0, 1, device="cuda:97")
    assert caught.value.rank == 0


def test_without_a_launcher_init_says_how_to_start(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(errors.LaunchNothingError, match="unisono run -n 4"):
        unisono.init()


class Torch(types.ModuleType):
    """What `from_process_group` asks of torch.distributed."""

    def __init__(self, store, rank):
        super().__init__("torch.distributed")
        self.group = types.SimpleNamespace(group_name="0")
        self.rank = rank
        self.distributed_c10d = types.SimpleNamespace(
            _get_default_group=lambda: self.group, _get_process_group_store=lambda group: store
        )

    def is_initialized(self):
        return True

    def get_rank(self, group):
        return self.rank

    def get_world_size(self, group):
        return 1


def test_a_process_group_gives_store_rank_and_size(monkeypatch):
    store = unisono.MemoryStore()
    monkeypatch.setitem(sys.modules, "torch.distributed", Torch(store, 0))
    for _ in range(2):  # each time under keys of its own
        with unisono.Communicator.from_process_group() as rank:
            assert (rank.rank, rank.world_size) == (0, 1)
    assert store.check(["unisono/0/1/unisono/default/0/rank/0"]) or store.num_keys() > 0


def test_a_signal_handler_may_abort_but_not_call():
    import signal

    ranks = unisono.Communicator.threads(2)
    met = []

    def handle(number, frame):
        with pytest.raises(RuntimeError, match="signal handler"):
            ranks[0].barrier()
        met.append(number)
        ranks[0].abort("by the handler")

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(errors.AbortedError, match="by the handler"):
            ranks[0].barrier()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert met == [signal.SIGALRM]


def test_operations_go_on_while_the_program_does_something_else():
    def main(rank):
        over, told = threading.Event(), []
        arrays = [np.full(1_000_000, rank.rank + at, dtype=np.float32) for at in range(3)]
        works = [rank.all_reduce(x, async_op=True) for x in arrays]
        for work in works:
            work.add_done_callback(lambda work: (told.append(work), over.set() if len(told) == 3 else None))
        # Nobody waits in the library, and no other call of it is made.
        assert over.wait(30) and told == works
        assert all(work.is_completed() for work in works)
        return [float(x[-1]) for x in arrays]

    assert unisono.on_threads(2, main) == [[1.0, 3.0, 5.0]] * 2


def test_a_callback_that_cannot_be_called_is_refused_at_once():
    def main(rank):
        work = rank.all_reduce(np.ones(2), async_op=True)
        with pytest.raises(unisono.errors.ArgumentError, match="callback should be something that can be called, or None, got int"):
            work.add_done_callback(3)
        work.wait()
        return rank.rank

    assert unisono.on_threads(2, main) == [0, 1]


def test_a_callback_hears_of_a_failure_and_what_it_raises_goes_to_the_hook(monkeypatch):
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: raised.append(unraisable.exc_value))

    def main(rank):
        if rank.rank == 1:
            return None  # leaves
        over = threading.Event()

        def callback(work):
            try:
                work.wait()
            finally:
                over.set()

        rank.all_reduce(np.ones(1_000_000), async_op=True).add_done_callback(callback)
        assert over.wait(30)
        return None

    unisono.on_threads(2, main)
    deadline = time.monotonic() + 10
    while not raised and time.monotonic() < deadline:
        time.sleep(0.001)
    assert isinstance(raised[0], unisono.errors.PeerLeftError) and raised[0].rank == 1
