"""What the package says of itself: examples run, stubs are those of the library, exceptions are complete."""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unisono
from unisono import _native, errors

CLASSES = [value for value in vars(unisono).values() if inspect.isclass(value) and value.__module__ == "unisono"]
FUNCTIONS = [unisono.group, unisono.init, unisono.on_threads]
STUBS = ast.parse((Path(unisono.__file__).parent / "_native.pyi").read_text())


def members():
    for owner in [*CLASSES, *FUNCTIONS]:
        yield owner.__name__, owner
        for name, member in vars(owner).items() if inspect.isclass(owner) else ():
            if not name.startswith("_"):
                yield f"{owner.__name__}.{name}", getattr(owner, name)


@pytest.mark.parametrize("name", [name for name, _ in members()])
def test_everything_is_documented_and_its_examples_run(name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "UNISONO_STORE"):  # examples play launcher
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    member = dict(members())[name]
    text = inspect.getdoc(member)
    assert text, f"{name} has no documentation"
    is_of_communicator = name.startswith("Communicator.") and callable(member)
    assert ">>>" in text or not is_of_communicator, f"{name} has no example"
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    output: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=flags).run(test, out=output.append)
    assert failed == 0, "".join(output)


def test_the_example_of_the_readme_runs(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        (tmp_path / "program.py").write_text(block + "assert (gradient == 0.5).all() and (everybody == 0.5).all()\n")
        command = [sys.executable, "-m", "unisono", "run", "-n", "2", "--", sys.executable, "program.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def arguments(function: ast.FunctionDef) -> list[str]:
    found = function.args
    return [arg.arg for arg in [*found.posonlyargs, *found.args, *found.kwonlyargs] if arg.arg not in ("self", "cls")]


def test_stubs_name_what_there_is_with_its_arguments():
    declared = {node.name: node for node in STUBS.body if isinstance(node, ast.ClassDef)}
    for owner in CLASSES:
        body = {node.name: node for node in declared[owner.__name__].body if isinstance(node, ast.FunctionDef)}
        public = {name for name in vars(owner) if not name.startswith("_")}
        assert public == {name for name in body if not name.startswith("_")}, owner
        for name in public:
            member = getattr(owner, name)
            if not callable(member):
                continue
            parameters = inspect.signature(member).parameters.values()
            kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            real = [parameter.name for parameter in parameters if parameter.kind not in kinds and parameter.name != "self"]
            assert arguments(body[name]) == real, f"{owner.__name__}.{name}"


def test_every_error_of_the_library_has_its_class_and_attributes():
    kinds = _native.error_kinds()
    assert len(kinds) == len({name for name, _ in kinds}) > 50
    classes = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert classes == {"UnisonoError", *(name for name, _ in kinds)}
    for name, attributes in kinds:
        declared = getattr(errors, name).__annotations__.keys() | unisono.UnisonoError.__annotations__.keys()
        assert set(attributes) <= declared, name
        assert issubclass(getattr(errors, name), unisono.UnisonoError) and getattr(errors, name).__doc__


def test_errors_are_those_of_python_too_and_can_be_pickled():
    assert issubclass(errors.TimeoutError, builtins.TimeoutError) and issubclass(errors.SignalError, builtins.TimeoutError)
    assert issubclass(errors.ArgumentError, ValueError) and issubclass(errors.StoreIoError, ConnectionError)
    with pytest.raises(errors.StoreTimeoutError) as caught:
        unisono.MemoryStore().get("a", timeout=0.01)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), vars(copy)) == (str(caught.value), vars(caught.value)) and copy.key == "a"
