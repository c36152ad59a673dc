"""The shape of the code: imports between rooms, names, the public names, the error tree."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import smolvm_async
from smolvm_async import errors

PACKAGE = Path(smolvm_async.__file__).parent
REPOSITORY = PACKAGE.parent

# Each room and those whose modules it may import, besides its own: data flows one way. Rows come in
# the order of the data, and a room knows only rooms of rows above its own.
ROOMS = {
    "errors": "",
    "foundation": "errors",
    "guests": "foundation",
    "config": "guests",
    "host": "config",
    "state": "host",
    "images": "state",
    "qemu": "images",
    "controls": "qemu",
    "doctor": "controls",
    "vm": "doctor",
    "fleet": "vm",
    "agents": "vm",
    "__init__": "fleet",
    "cli": "__init__",
    "__main__": "cli",
}
ORDER = list(ROOMS)
ROOT = {"__init__", "__main__", "errors"}  # the modules that are not in a folder
# A type of a later room that a module names for type checkers only, and never imports when it runs.
TYPES = {"errors": ("controls.commands.result", "qemu.events")}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def room(module: str) -> str:
    """Return the room that a module is in."""
    return module.split(".")[0]


def imports(module: str) -> Iterator[str]:
    """Yield the full name of all that a module imports, anywhere in it."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if own(submodule) in MODULES else node.module


def own(name: str) -> str:
    """The module of this library that a full name means: `images.qcow2`; empty if none."""
    if name == "smolvm_async":
        return "__init__"
    module = name.removeprefix("smolvm_async.")
    if module == name:
        return ""
    return module if module in MODULES else f"{module}.__init__"


def test_every_module_is_in_a_room_and_every_room_has_modules() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)
    assert {module for module in MODULES if "." not in module} == ROOT


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_room_and_those_above(module: str) -> None:
    known = ROOMS[room(module)]
    may_know = {room(module), *(ORDER[: ORDER.index(known) + 1] if known else ())}
    for name in imports(module):
        if (other := own(name)) and other not in TYPES.get(module, ()):
            assert other in MODULES, name
            assert room(other) in may_know, f"{module} imports {name}"


def test_only_the_monitor_imports_the_qmp_client() -> None:
    importers = {
        module for module in MODULES for name in imports(module) if re.match(r"qemu(\.|$)", name)
    }
    assert importers == {"qemu.monitor"}


SPAWNING = {
    *("create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell"),
    *("Popen", "check_call", "check_output", "getoutput", "getstatusoutput", "open_process"),
    *("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen", "run_process"),
}
HARMLESS = ("platform.system", "vm.fork")


def spawns(module: str) -> Iterator[str]:
    """Calls that start a process, and imports that could hide one."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            by_name = node.attr in SPAWNING or re.match("(exec|spawn)[lv]", node.attr)
            call = f"{owner}.{node.attr}"
            if call == "subprocess.run" or (by_name and call not in HARMLESS):
                yield call
        elif isinstance(node, ast.ImportFrom) and node.module in ("subprocess", "os", "pty"):
            yield f"from {node.module}"
        elif isinstance(node, ast.Import):
            hidden = {"subprocess", "multiprocessing", "pty", "concurrent.futures"}
            yield from (alias.name for alias in node.names if alias.name in hidden)


def test_only_one_module_starts_processes() -> None:
    found = {module: list(spawns(module)) for module in MODULES}
    assert found.pop("foundation.process"), "the search itself finds nothing"
    assert {module: calls for module, calls in found.items() if calls} == {}


@pytest.mark.parametrize("module", MODULES)
def test_a_library_does_not_print(module: str) -> None:
    names = [node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)]
    assert "print" not in names


# Modules of more than 600 lines, and why each is one thing.
LONG = {
    "vm.run": "one run of a VM, from its plan to its end, where all parts of the VM meet",
    "vm.vm": "the class that users see: most lines are docstrings for them",
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_one_thing_with_a_name_of_its_own(module: str) -> None:
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= 600 or LONG.get(module), f"{lines} lines: say in LONG why it is one thing"
    for part in module.split("."):
        assert not re.search("util|helper|common|misc", part)
    assert ast.get_docstring(tree(module)), "its one responsibility"


# The public names


def public_classes_and_functions() -> list[tuple[str, object]]:
    return [(name, getattr(smolvm_async, name)) for name in smolvm_async.__all__]


def test_all_is_sorted_and_complete() -> None:
    assert list(smolvm_async.__all__) == sorted(set(smolvm_async.__all__))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree("__init__"))
        if isinstance(node, ast.ImportFrom) and own(node.module or "")
        for alias in node.names
    }
    assert set(smolvm_async.__all__) == imported
    raised = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert {name for name in raised if name.endswith(("Error", "Warning"))} <= imported
    assert dir(smolvm_async) == smolvm_async.__all__


def test_what_only_fleets_and_s3_need_is_imported_on_first_use() -> None:
    code = (
        "import sys, smolvm_async\n"
        "print(*(name for name in sys.modules if name.startswith('smolvm_async.')))\n"
        "from smolvm_async import *\n"
        "print(Fleet.__name__, ImageStore.__name__, push_image.__name__)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    modules, used = done.stdout.splitlines()
    rooms = {".".join(name.split(".")[1:3]) for name in modules.split()}
    assert not rooms & {"fleet", "doctor", "cli", "images.cache", "images.build", "images.publish"}
    assert used == "Fleet ImageStore push_image"
    with pytest.raises(AttributeError, match="no attribute 'Fleets'"):
        smolvm_async.Fleets  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(("name", "value"), public_classes_and_functions())
def test_every_public_name_is_documented_with_its_members(name: str, value: object) -> None:
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert documented(value), name
    for parent in inspect.getmro(value) if inspect.isclass(value) else ():
        if parent.__module__.startswith("smolvm_async"):
            for member, attribute in vars(parent).items():
                if not member.startswith("_") and documentable(attribute):
                    assert inspect.getdoc(attribute), f"{name}.{member}"


def documentable(attribute: object) -> bool:
    kinds = (FunctionType, property, classmethod, staticmethod)
    return isinstance(attribute, kinds)


def documented(value: object) -> bool:
    """Return whether it has a docstring (Python gives a dataclass without one its signature)."""
    assert inspect.isclass(value) or inspect.isfunction(value)
    (node,) = ast.parse(inspect.getsource(value)).body
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return bool(ast.get_docstring(node))


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


# The errors


def drawn() -> list[tuple[str, str | None, str | None]]:
    """The tree in the docstring of errors.py: each name, its parent, and its second base."""
    found: list[tuple[str, str | None, str | None]] = []
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│ ]*(?:[├└]── )?)(\w+Error)(?: \((\w+)\))?(?:  |$)", line):
            depth = len(match[1]) // 4
            del path[depth:]
            found.append((match[2], path[-1] if path else None, match[3]))
            path.append(match[2])
    return found


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    for module in MODULES:
        importlib.import_module(f"smolvm_async.{module}".removesuffix(".__init__"))

    def real(kind: type[errors.SmolVMError]) -> Iterator[tuple[str, str | None, str | None]]:
        bases = [base.__name__ for base in kind.__bases__]
        parent, second = (*bases, None)[:2] if kind is not errors.SmolVMError else (None, None)
        yield kind.__name__, parent, second
        for child in kind.__subclasses__():
            if child.__module__.startswith("smolvm_async."):  # and not a test
                yield from real(child)

    assert len(drawn()) > 5
    assert sorted(drawn(), key=str) == sorted(real(errors.SmolVMError), key=str)
    assert {name for name, _, _ in drawn()} == {
        name for name in vars(errors) if name.endswith("Error")
    }
    assert "AcceleratorWarning" in (errors.__doc__ or "")


# The repository

TOP_LEVEL = {
    *("pyproject.toml", "smolvm_async", "tests", "examples", "benchmarks"),
    *("README.md", "CHANGELOG.md", "LICENSE"),
}


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is not a checkout")
def test_the_top_level_holds_nothing_else() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    entries = {line.strip('"').split("/")[0] for line in done.stdout.splitlines()}
    assert "smolvm_async" in entries
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL
