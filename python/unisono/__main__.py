"""The command: `python -m unisono`, and `unisono` where the package is installed."""

from __future__ import annotations

import signal
import sys

from ._native import command


def main() -> int:
    """Runs the command with the arguments of this process, and returns its exit code."""
    # Python only notes an interrupt until the next line of Python, and none comes before the command has ended.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return command([sys.executable, "-m", "unisono"], sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
