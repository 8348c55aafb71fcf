"""The modules of the Ray application import one way, are short, and few of them know Ray."""

import graphlib
import subprocess
import sys
from pathlib import Path

from helpers.imported import imports

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "integrations" / "ray" / "kvcached_ray"
MAX_LINES = 300
# What meets Ray; all else runs, and is tested, without it.
KNOWS_RAY = {"application", "counting", "door", "node"}
# Values in, decisions out: no I/O, no clock, no tasks.
PURE = {"members", "placing", "ranking", "report", "views"}
NOT_PURE = {"asyncio", "os", "time", "socket", "subprocess", "threading", "pathlib", "logging"}


def modules() -> dict[str, Path]:
    return {file.stem: file for file in sorted(PACKAGE.glob("*.py")) if file.name != "__init__.py"}


def users_of(names: set[str]) -> set[str]:
    return {
        module
        for module, file in modules().items()
        if {name.partition(".")[0] for name in imports(file)} & names
    }


def test_no_modules_import_each_other() -> None:
    known = modules()
    graph = {
        name: {
            inner
            for full in imports(file)
            if (inner := full.removeprefix("kvcached_ray.")) in known and inner != full
        }
        for name, file in known.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_few_modules_know_ray() -> None:
    assert users_of({"ray"}) == KNOWS_RAY


def test_decisions_are_pure() -> None:
    assert users_of(NOT_PURE) & PURE == set()


def test_modules_are_short() -> None:
    long = [
        name for name, file in modules().items() if len(file.read_text().splitlines()) > MAX_LINES
    ]
    assert long == []


def test_what_serve_ships_by_value_imports_nothing_of_ours() -> None:
    assert not {name for name in imports(modules()["counting"]) if name.startswith("kvcached")}


def test_what_decides_can_be_imported_without_ray() -> None:
    program = (
        "import sys, kvcached_ray.members, kvcached_ray.views, kvcached_ray.leases;"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
