"""The gateway's folders import one way, its modules are short, and its rules stay pure."""

import graphlib
from pathlib import Path

from helpers.imported import imports

GATEWAY = Path(__file__).parents[2] / "integrations" / "gateway" / "kvcached_gateway"
BOTTOM = {"errors", "lease", "observe", "state"}
# What the modules at the top, and the folders, may import beside themselves.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "lease": set(),
    "observe": {"lease"},
    "state": set(),
    "settings": BOTTOM,
    "policy": {"settings"},
    "line": BOTTOM | {"settings", "policy"},
    "engines": BOTTOM | {"settings"},
    "models": BOTTOM | {"settings", "policy", "engines", "line"},
    "admin": BOTTOM | {"settings"},
    "control": BOTTOM | {"settings", "policy", "line", "engines", "models", "admin"},
    "http": BOTTOM | {"settings"},
    "listening": {"admin", "control", "http"},
    "serve": BOTTOM
    | {"settings", "line", "engines", "models", "admin", "control", "http", "listening"},
    "commands": BOTTOM | {"settings", "admin", "serve"},
}
# The policy is values in, decisions out: no I/O, no clock, no tasks.
NOT_PURE = {"asyncio", "os", "time", "socket", "subprocess", "threading", "pathlib", "logging"}
MAX_LINES = 300


def modules() -> dict[str, Path]:
    return {
        ".".join(file.relative_to(GATEWAY).with_suffix("").parts): file
        for file in sorted(GATEWAY.rglob("*.py"))
        if file.name != "__init__.py"
    }


def graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: {
            inner
            for full in imports(file)
            if (inner := full.removeprefix("kvcached_gateway.")) in known and inner != full
        }
        for name, file in known.items()
    }


def test_folders_import_one_way() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(MAY_IMPORT)
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if (there := other.partition(".")[0]) != (here := name.partition(".")[0])
        if there not in MAY_IMPORT[here]
    ]
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    graphlib.TopologicalSorter(graph()).prepare()


def test_the_policy_reads_nothing() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, file in modules().items()
        if name.startswith("policy.")
        for module in imports(file)
        if module.partition(".")[0] in NOT_PURE
    ]
    assert wrong == []


def test_modules_are_short() -> None:
    assert [
        name for name, file in modules().items() if len(file.read_text().splitlines()) > MAX_LINES
    ] == []


def test_folders_say_in_one_line_what_they_are() -> None:
    assert [
        file for file in GATEWAY.rglob("*/__init__.py") if len(file.read_text().splitlines()) != 1
    ] == []
