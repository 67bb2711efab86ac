"""Rank 0 waits for a rank that does not come, gets SIGINT, and ends by KeyboardInterrupt; the other is told why."""

import os
import signal
import sys
import threading
import time

import numpy as np

import unisono

kind = sys.argv[1]
rank = unisono.init(timeout=60)
if rank.rank == 0:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    try:
        if kind == "collective":
            rank.all_reduce(np.ones(3))
        elif kind == "work":
            rank.all_reduce(np.ones(3), async_op=True).wait()
        elif kind == "message":
            rank.recv(np.ones(3), 1)
        elif kind == "split":
            rank.split(0)
        elif kind == "group":
            with unisono.group():
                rank.recv(np.ones(3), 1)
        print("it came back")
    except KeyboardInterrupt:
        assert time.monotonic() - begun < 5
        print("interrupted")
else:
    try:
        time.sleep(1)
        rank.barrier()
    except unisono.errors.AbortedError as error:
        print("told:", error.rank, error.reason)
