"""Communication for the ranks of one job: collectives, messages and symmetric memory for arrays of any framework.

    import numpy as np, unisono

    with unisono.init() as rank:                    # in a process that `unisono run -n 4 -- python program.py` started
        gradient = np.full(1000, rank.rank, dtype=np.float32)
        rank.all_reduce(gradient, "avg")            # in place, the same bits on every rank

Everything hangs on `Communicator`. Exceptions are in `unisono.errors`, all below `UnisonoError`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from . import errors
from ._native import (
    Communicator,
    FileStore,
    Group,
    MemoryStore,
    PrefixStore,
    Store,
    StoreServer,
    SymmetricMemory,
    TcpStore,
    TorchStore,
    TorchStoreServer,
    UniqueId,
    View,
    Work,
    __version__,
    group,
)
from .errors import UnisonoError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._native import Options

__all__ = [
    "Communicator",
    "FileStore",
    "Group",
    "MemoryStore",
    "PrefixStore",
    "Store",
    "StoreServer",
    "SymmetricMemory",
    "TcpStore",
    "TorchStore",
    "TorchStoreServer",
    "UniqueId",
    "UnisonoError",
    "View",
    "Work",
    "__version__",
    "errors",
    "group",
    "init",
    "on_threads",
]

T = TypeVar("T")


def init(**options: Unpack[Options]) -> Communicator:
    """Joins the world that the launcher of this process describes. See ``Communicator.from_env``, which has the options.

    >>> import os, tempfile, unisono
    >>> os.environ.update(RANK="0", WORLD_SIZE="1", UNISONO_STORE=f"file://{tempfile.mkdtemp()}/store")  # a launcher does that
    >>> with unisono.init() as rank:
    ...     rank.world_size
    1
    """
    return Communicator.from_env(**options)


def on_threads(world_size: int, main: Callable[[Communicator], T]) -> list[T]:
    """Runs ``main(communicator)`` on ``world_size`` threads, as the ranks of a world of their own, and returns what they returned, by
    rank. For trying things out, and for tests: no launcher is needed.

    A communicator that ``main`` does not destroy is dropped when it returns or raises; ranks that still need it notice. If ranks raise,
    this raises what the lowest of them raised, where errors that are not of this package go first: they are the causes. Ctrl-C aborts the
    world, and raises when all threads have ended.

    >>> import unisono
    >>> unisono.on_threads(3, lambda rank: 10 * rank.rank)
    [0, 10, 20]
    """
    results: dict[int, T] = {}
    failures: list[tuple[int, BaseException]] = []
    running = dict(enumerate(Communicator.threads(world_size)))

    def run(number: int) -> None:
        try:
            results[number] = main(running[number])
        except BaseException as failure:
            failures.append((number, failure))
        finally:
            del running[number]

    threads = [threading.Thread(target=run, args=(number,), name=f"rank {number}") for number in range(world_size)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as interrupt:
        for communicator in list(running.values()):
            communicator.abort(f"{type(interrupt).__name__} on the thread that runs the world")
        for thread in threads:
            thread.join()
        raise
    if failures:
        causes = [failure for failure in failures if not isinstance(failure[1], UnisonoError)]
        raise min(causes or failures, key=lambda failure: failure[0])[1]
    return [results[number] for number in range(world_size)]
