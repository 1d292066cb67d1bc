"""Floors and doors of docs/design.md, held by reading the imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import metarec_jax
from metarec_jax import jax_private
from metarec_jax.core import MetarecError

ROOT = Path(metarec_jax.__file__).parent
FLOORS = [
    {"core", "tree", "rows", "cpu", "files", "signals", "options", "messages", "jax_private"},
    {"losses", "factorization", "models", "data", "data/io", "data/store"},
    {"learners", "training", "training/checkpoints", "training/devices", "evaluation", "serving"},
    {"baselines", "report"},
    {"experiment", "experiment/compare"},
    {"commands"},
    {"cli"},
]
"""Rooms, folders or single files of the package, by floor; imports go down, or across without a circle."""
LEFT, RIGHT = {"learners"}, {"training", "training/checkpoints", "training/devices", "evaluation", "serving"}
DOORS = {
    "flax": {"models"},
    "orbax": {"training/checkpoints/arrays"},
    "matplotlib": {"report/write", "report/plots"},
    "rax": {"evaluation/metrics"},
    "tyro": {"cli"},
    "pandas": {"data", "evaluation", "report", "experiment/compare/choice"},
    "pyarrow": {"data"},
    "tensorboardX": {"training/progress"},
    "urllib": {"data/io/datasets"},
    "duckdb": {"data/store/prepare"},
    "grain": {"data/store/stream"},
    "pickle": set(),
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")
MODULES = {".".join(["metarec_jax", *p.relative_to(ROOT).with_suffix("").parts]): p for p in FILES}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


@cache
def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[Path]:
    """The files of the package that a file imports."""
    return {
        MODULES[part]
        for dotted in imports(path)
        for part in (dotted, dotted.rpartition(".")[0])
        if part in MODULES and MODULES[part] != path
    }


def room(path: Path) -> str:
    folder = str(path.parent.relative_to(ROOT))
    return path.stem if folder == "." else folder


def floor(of: str) -> int:
    return next(k for k, rooms in enumerate(FLOORS) if of in rooms)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The nodes of a graph that are left when those without arrows to nodes that are left are taken away, again and again."""
    left = dict(arrows)
    while free := [node for node, targets in left.items() if not targets & left.keys() - {node}]:
        for node in free:
            del left[node]
    return sorted(left)


def test_imports_go_down():
    for path in FILES:
        here = room(path)
        for other in own_imports(path):
            there = room(other)
            assert floor(there) <= floor(here), f"{name(path)} imports upwards: {name(other)}"
            assert not (here in LEFT and there in RIGHT), f"{name(path)}: {name(other)}"
            assert not (here in RIGHT and there in LEFT), f"{name(path)}: {name(other)}"


def test_there_is_no_circle_of_files_nor_of_rooms():
    files = {name(path): {name(other) for other in own_imports(path)} for path in FILES}
    assert circle(files) == []
    rooms: dict[str, set[str]] = {room(path): set() for path in FILES}
    for path in FILES:
        rooms[room(path)] |= {room(other) for other in own_imports(path)}
    assert circle(rooms) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]  # a circle is found


def test_each_heavy_dependency_has_one_door():
    for path in FILES:
        here = name(path)
        for dotted in imports(path):
            allowed = DOORS.get(dotted.split(".")[0])
            assert allowed is None or {here, room(path), here.split("/")[0]} & allowed, f"{here} imports {dotted}"


def test_private_names_of_jax_have_one_door():
    """`jax_private`: imported anywhere else, a new release of JAX would break a place that nobody thinks of."""
    private = ("jax._src", "jax.extend", "jax.interpreters")
    users = {name(p) for p in FILES if any(dotted.startswith(private) for dotted in imports(p))}
    assert users <= {"jax_private"}


def test_pip_is_held_to_the_releases_of_jax_that_are_tested():
    (oldest, newest), text = (jax_private.OLDEST, jax_private.NEWEST), (ROOT.parent / "pyproject.toml").read_text()
    assert f'"jax>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"' in text


def test_a_release_of_jax_without_a_private_name_is_named():
    with pytest.raises(MetarecError, match=r"lacks jax\._src\.distributed\.gone; .* pip install 'jax>=0"):
        jax_private._private("jax._src.distributed", "gone")


LOADED = """
import sys
{statement}
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"jax", "numpy", "pandas", "matplotlib", "flax", "scipy"}}))
"""


HELP = """
import contextlib, io, metarec_jax.cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    metarec_jax.cli.main(["--help"])
"""


@pytest.mark.parametrize(
    "statement", ["import metarec_jax", "import metarec_jax.cli", HELP], ids=["package", "cli", "help"]
)
def test_help_and_import_are_quick(statement):
    """Neither the package nor what ``metarec --help`` reads imports a library that takes long."""
    program = LOADED.format(statement=statement)
    bare = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}  # as a user has it
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=bare)
    assert done.stdout == "[]\n"


def test_the_ground_floor_imports_jax_only():
    """Beside the standard library."""
    for path in FILES:
        if floor(room(path)) == 0:
            outside = {d.split(".")[0] for d in imports(path)} - {*sys.stdlib_module_names, "metarec_jax"}
            assert outside <= {"jax"}, f"{name(path)} imports {outside}"


def test_nothing_names_a_machine():
    """No file that is shipped or replayed holds a path of the machine it was made on."""
    tree = [p for d in ("metarec_jax", "tests", "benchmarks", "examples", "docs") for p in (ROOT.parent / d).rglob("*")]
    path = re.compile(rb"/tmp/" + rb"tmp\w{6}|/home/" + rb"\w|/root" + rb"/\w")
    assert not [str(p) for p in tree if p.is_file() and "__pycache__" not in p.parts and path.search(p.read_bytes())]


def test_the_stub_that_editors_read_has_every_public_name():
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    names = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(metarec_jax.__all__)
    assert all(getattr(metarec_jax, name) is not None for name in names)
