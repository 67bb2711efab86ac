"""What the package says of itself: examples run, stubs are those of the library, exceptions are complete."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import unisono
from unisono import _native, errors

MODULES = [unisono.ep]
if importlib.util.find_spec("torch"):
    MODULES.append(importlib.import_module("unisono.deep_ep"))
CLASSES = [
    value
    for module in (unisono, unisono.ep)
    for value in vars(module).values()
    if inspect.isclass(value) and value.__module__ == module.__name__
]
FUNCTIONS = [unisono.group, unisono.init, unisono.on_threads]
# Written in Python, with their types.
PYTHON = [getattr(module, name) for module in MODULES[1:] for name in module.__all__ if callable(getattr(module, name))]
STUBS = ast.parse((Path(unisono.__file__).parent / "_native.pyi").read_text())


def members():
    for owner in [*CLASSES, *FUNCTIONS, *PYTHON]:
        yield f"{owner.__module__}.{owner.__qualname__}", owner
        for name, member in vars(owner).items() if inspect.isclass(owner) else ():
            if not name.startswith("_"):
                yield f"{owner.__module__}.{owner.__qualname__}.{name}", getattr(owner, name)


@pytest.mark.parametrize("name", [name for name, _ in members()])
def test_everything_is_documented_and_its_examples_run(name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "UNISONO_STORE"):  # examples play launcher
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    member = dict(members())[name]
    text = inspect.getdoc(member)
    assert text, f"{name} has no documentation"
    inside = inspect.getdoc(dict(members()).get(name.rpartition(".")[0])) or ""
    is_shown = ">>>" in text or f".{name.rpartition('.')[2]}(" in inside
    assert is_shown or not callable(member) or inspect.isclass(member), f"{name} has no example"
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


def test_the_package_needs_nothing_but_python(tmp_path):
    assert metadata.requires("unisono") is None
    (tmp_path / "unisono").symlink_to(Path(unisono.__file__).parent)
    program = "import array, unisono; print(unisono.on_threads(2, lambda rank: rank.all_reduce(array.array('f', [1, 2])).tolist()))"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[[2.0, 4.0], [2.0, 4.0]]\n", done.stderr


def test_the_wheel_of_the_name_deep_ep_belongs_to_this_version():
    assert metadata.version("unisono-deep-ep") == metadata.version("unisono") == unisono.__version__
    assert f"unisono=={unisono.__version__}" in metadata.requires("unisono-deep-ep")
    files = [str(file) for file in metadata.files("unisono-deep-ep")]
    assert "deep_ep/__init__.py" in files and "deep_ep/py.typed" in files


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
