"""torch's own tests of its backends (`torch.testing._internal.distributed.distributed_test`), run against the backend "unisono".

    python torch_suite.py gloo|mpi [NAME…]       # prints NAME passed, skipped, failed or not there; without names all of them

Torch leaves out what a backend lacks, by its name. Gloo and MPI have, between them, all that there is on CPUs: the tests are told one of
them, and every group that they make is one of ours. Processes are forked, as each would take seconds to import torch.
"""

import os
import sys
import unittest

PLAYED = sys.argv[1] if __name__ == "__main__" else "gloo"
os.environ.update(BACKEND=PLAYED, WORLD_SIZE={"gloo": "3", "mpi": "4"}[PLAYED])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed as dist
import torch.multiprocessing
from torch.testing._internal import common_distributed
from torch.testing._internal.distributed import distributed_test

import unisono.torch

for name in ("init_process_group", "new_group"):
    theirs = getattr(dist, name)
    setattr(dist, name, lambda *args, theirs=theirs, **given: theirs(*args, **{**given, "backend": "unisono"}))
distributed_test.is_mpi_available = common_distributed.c10d.is_mpi_available = dist.is_mpi_available = lambda: True


class TorchSuite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
    def setUp(self):
        super().setUp()
        self._start_processes(torch.multiprocessing.get_context("fork").Process)


class Result(unittest.TestResult):
    def say(self, test, outcome):
        print(test.id().split(".")[-1], outcome, flush=True)

    def addSuccess(self, test):
        self.say(test, "passed")

    def addSkip(self, test, reason):
        self.say(test, f"skipped: {reason}")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.say(test, "failed")
        print(self.failures[-1][1] if self.failures else error, file=sys.stderr, flush=True)

    def addError(self, test, error):
        super().addError(test, error)
        self.say(test, "failed")
        print(self.errors[-1][1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    there = unittest.defaultTestLoader.getTestCaseNames(TorchSuite)
    names = [name for name in sys.argv[2:] if name in there] or there
    for name in set(sys.argv[2:]).difference(there):
        print(name, "not there")
    result = Result()
    unittest.TestSuite(TorchSuite(name) for name in names).run(result)
    sys.exit(not result.wasSuccessful())
