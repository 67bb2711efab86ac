"""The Python programs of the book run as it says, and print what it says.

Blocks of Python are programs. One that begins with a comment like `# train.py` is run by the command in the block of shell that follows,
any other by itself. A block of text that follows is what it prints, lines of ranks in any order; what differs from run to run stands in a
block of console. `# Needs torch` in front leaves a program to machines that have it, `# Needs torch and a GPU` only has to compile.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BOOK = Path(__file__).parents[2] / "docs" / "src"
FENCE = re.compile(r"^```([\w,]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = {"unisono": [sys.executable, "-m", "unisono"], "python": [sys.executable]}


def programs():
    """Name, program, command and expected output (None if the book shows none) of each."""
    for page in sorted(BOOK.glob("*.md")):
        text = page.read_text()
        blocks = [(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in FENCE.finditer(text)]
        blocks += [("", "", 0)] * 2
        for index, (language, program, line) in enumerate(blocks):
            if language != "python":
                continue
            name = re.search(r"^# (\w+\.py)$", program, re.MULTILINE)
            command, after = "python program.py", index + 1
            if name:
                assert blocks[after][0] == "sh", f"{page.name}:{line}: no command runs {name[1]}"
                command, after = blocks[after][1].strip(), after + 1
                assert command.endswith(f"python {name[1]}"), f"{page.name}:{line}: {command}"
            output = blocks[after][1] if blocks[after][0] == "text" else None
            yield pytest.param(program, command, output, id=f"{page.stem}-{line}")


@pytest.mark.parametrize(("program", "command", "output"), list(programs()))
def test_a_program_of_the_book_prints_what_the_book_says(program, command, output, tmp_path):
    compile(program, "program", "exec")
    needs = re.match(r"# Needs (.*)\n", program)
    if needs and needs[1] != "torch":
        return
    if needs:
        pytest.importorskip(needs[1])
    words = shlex.split(command)
    (tmp_path / words[-1]).write_text(program)
    arguments = [part for word in words for part in PROGRAMS.get(word, [word])]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    if output is not None:
        assert sorted(done.stdout.splitlines()) == sorted(output.splitlines()), done.stdout


def test_the_book_has_programs_that_run_and_show_what_they_print():
    outputs = [parameters.values[2] for parameters in programs()]
    assert len(outputs) > 10 and sum(output is not None for output in outputs) > 8
