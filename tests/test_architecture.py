"""The shape of the package: imports go down the ladder, libraries stay where they belong, importing does nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv2

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dsv2"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A room may import rooms of lower rungs, and none of its own rung.
LADDER = (
    ("config", "files"),
    ("kernels", "text", "device"),
    ("parallel",),
    ("model",),
    ("data", "weights"),
    ("adapters",),
    ("train", "engine"),
    ("align", "evals", "serve"),
)
RUNGS = {room: height for height, rung in enumerate(LADDER) for room in rung}
# What ties everything together: these may import each other too. "" is the package itself, its public surface.
TOP = {"", "cli", "__main__", "demo", "describe", "report", "bench"}
# Lower, and yet none of their business.
FORBIDDEN = {"data": {"model", "kernels", "parallel"}, "evals": {"train"}, "serve": {"train"}}

WITHOUT_TORCH = ["dsv2", "dsv2.config", "dsv2.text", "dsv2.data", "dsv2.engine.scheduler"]
KERNEL_FILES = {"__init__.py", "reference.py", "kernel.py", "cases.py"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def room_of(module: str) -> str:
    """`dsv2.model.mla` is in the room `model`; the package itself is the room ""."""
    return module.split(".")[1] if "." in module else ""


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Modules that an import statement names; `from a import b` is `a.b` where that is a module of ours."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = module.split(".")
        base = base[: len(base) - node.level + is_package] if node.level else []
        source = ".".join([*base, node.module] if node.module else base)
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            yield inner if inner in MODULES else source


def all_imports(module: str) -> set[str]:
    """Of the whole file, imports inside functions included."""
    file = MODULES[module]
    nodes = ast.walk(parse(file))
    return {name for node in nodes for name in imported(node, module, file.name == "__init__.py")}


def imports_when_imported(module: str) -> set[str]:
    """Of the module's own statements, without functions and without what only a type checker reads."""
    file, found = MODULES[module], set()
    pending: list[ast.AST] = list(parse(file).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found |= set(imported(node, module, file.name == "__init__.py"))
        pending += ast.iter_child_nodes(node)
    return found


def in_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    return request.param


# The ladder -------------------------------------------------------------------------------------------------------


def test_every_room_has_its_place_on_the_ladder() -> None:
    assert {room_of(m) for m in MODULES} - TOP <= RUNGS.keys()


def test_imports_go_down_the_ladder(module: str) -> None:
    room = room_of(module)
    if room in TOP:
        return
    ours = {room_of(name) for name in all_imports(module) if name.split(".")[0] == "dsv2"} - {room}
    upwards = {other for other in ours if RUNGS.get(other, len(LADDER)) >= RUNGS[room]}
    assert not upwards, f"{module} may not import {', '.join(other or 'dsv2 itself' for other in sorted(upwards))}"


def test_rooms_leave_alone_what_is_none_of_their_business(module: str) -> None:
    ours = {room_of(name) for name in all_imports(module) if name.split(".")[0] == "dsv2"}
    assert not ours & FORBIDDEN.get(room_of(module), set())


def test_no_module_imports_itself_through_others() -> None:
    graph = {m: imports_when_imported(m) & MODULES.keys() - {m} for m in MODULES}
    while leaves := {m for m, needs in graph.items() if not needs}:
        graph = {m: needs - leaves for m, needs in graph.items() if m not in leaves}
    assert not graph, f"import cycle among {', '.join(sorted(graph))}"


@pytest.mark.parametrize("room", ["config", "files"])
def test_the_lowest_rooms_need_the_standard_library_alone(room: str) -> None:
    names = {name.split(".")[0] for m in MODULES if room_of(m) == room for name in all_imports(m)}
    assert names - {"dsv2"} <= sys.stdlib_module_names


# Kernels ----------------------------------------------------------------------------------------------------------


def test_triton_is_imported_by_kernels_alone(module: str) -> None:
    file = MODULES[module].relative_to(PACKAGE)
    is_kernel = len(file.parts) == 3 and file.parts[0] == "kernels" and file.name in ("kernel.py", "hopper.py")
    assert is_kernel or "triton" not in {name.split(".")[0] for name in all_imports(module)}


def test_every_kernel_room_has_its_four_files() -> None:
    rooms = {file.parent for file in FILES if file.relative_to(PACKAGE).parts[:1] == ("kernels",)}
    for room in rooms - {PACKAGE / "kernels"}:
        assert {file.name for file in room.glob("*.py")} >= KERNEL_FILES, room.name


# Manners ----------------------------------------------------------------------------------------------------------


def test_nothing_is_printed(module: str) -> None:
    calls = [node.func for node in ast.walk(parse(MODULES[module])) if isinstance(node, ast.Call)]
    assert "print" not in {function.id for function in calls if isinstance(function, ast.Name)}


@pytest.mark.parametrize("name", [name for name in WITHOUT_TORCH if name in MODULES])
def test_importing_takes_no_torch(name: str) -> None:
    loaded = json.loads(in_python(f"import json, sys, {name}; print(json.dumps(sorted(sys.modules)))"))
    assert name in loaded
    assert not {"torch", "triton", "transformers", "matplotlib", "tensorboard"} & set(loaded)


def test_every_public_name_is_there() -> None:
    assert [name for name in dsv2.__all__ if getattr(dsv2, name, None) is None] == []


def test_importing_changes_neither_environment_nor_threads_nor_devices() -> None:
    modules = sorted(
        m for m in MODULES if room_of(m) != "__main__" and MODULES[m].name not in ("kernel.py", "hopper.py")
    )
    code = f"""
import os, threading, warnings
import torch
before = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()
warnings.simplefilter("error")
import {", ".join(modules)}
assert (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()) == before
assert threading.active_count() == 1
assert not torch.cuda.is_initialized()
"""
    in_python(code)


def test_every_module_says_what_it_is_for(module: str) -> None:
    tree = parse(MODULES[module])
    assert not tree.body or ast.get_docstring(tree)
