"""The core stays light, and dependencies point one way."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

REPORT = """
import json, sys
before = set(sys.modules)
import kvcached_core.ledger.ledger, kvcached_core.memory.arena, kvcached_core.engine.pages
print(json.dumps(sorted(set(sys.modules) - before)))
"""

PACKAGES = {
    "kvcached_core": ROOT / "kvcached_core",
    "kvcached_patches": ROOT / "patches" / "kvcached_patches",
    "kvcached_vllm": ROOT / "integrations" / "vllm" / "kvcached_vllm",
    "kvcached_sglang": ROOT / "integrations" / "sglang" / "kvcached_sglang",
    "kvcached_gateway": ROOT / "integrations" / "gateway" / "kvcached_gateway",
    "kvcached_ray": ROOT / "integrations" / "ray" / "kvcached_ray",
    "kvcached_demo": ROOT / "examples" / "demo" / "kvcached_demo",
}
MAY_IMPORT = {
    "kvcached_core": {"kvcached_core"},
    "kvcached_patches": {"kvcached_patches"},
    "kvcached_vllm": {"kvcached_vllm", "kvcached_core", "kvcached_patches"},
    "kvcached_sglang": {"kvcached_sglang", "kvcached_core", "kvcached_patches"},
    "kvcached_gateway": {"kvcached_gateway", "kvcached_core"},
    "kvcached_ray": {"kvcached_ray", "kvcached_gateway", "kvcached_core", "kvcached_patches"},
    "kvcached_demo": {"kvcached_demo", "kvcached_core"},
}

CORE = PACKAGES["kvcached_core"]
BOTTOM = {"errors", "units"}
# What the core's modules at the top, and its folders, may import of it beside themselves.
CORE_MAY_IMPORT = {
    "errors": set(),
    "units": {"errors"},
    "config": BOTTOM,
    "ledger": BOTTOM,
    "memory": BOTTOM | {"config", "ledger"},
    "weights": BOTTOM | {"config", "ledger", "memory"},
    "engine": BOTTOM | {"config", "ledger", "memory", "weights"},
    "program": BOTTOM | {"config", "ledger", "memory", "engine"},
    "control": BOTTOM | {"ledger"},
    "cli": BOTTOM | {"config", "ledger", "control"},
}
# Single arrows beside these, and why.
ARROWS_BESIDE = {
    ("cli.running", "program.run"),  # the command that is no look at the ledgers
    ("cli.running", "program.choosing"),
    ("cli.doctor", "memory.host_memory"),  # it says what engines may take of the host
    ("cli.doctor", "weights.survey"),  # and what copies of their weights find there
    ("cli.images", "weights.disk_survey"),  # and what of them lies on a disk
    ("cli.image_disk", "weights.disk_survey"),
    ("cli.tiers", "weights.host_tier"),  # what engines offloaded stands in the host budget
    ("cli.listing", "weights.host_tier"),
    ("cli.disk_tiers", "weights.host_tier"),
    ("cli.tier_metrics", "weights.host_tier"),
}
MAX_LAYERS = 7
MAX_ENTRIES = 11
MAX_LINES = 300

Graph = dict[str, set[str]]


def module_name(file: Path) -> str:
    parts = file.relative_to(CORE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def core_modules() -> dict[str, Path]:
    return {module_name(file): file for file in sorted(CORE.rglob("*.py"))}


def core_graph() -> Graph:
    """Return what each module of the core imports of it, also inside functions and for types."""
    modules = core_modules()
    graph: Graph = {name: set() for name in modules}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: name the module in full"
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            else:
                continue
            for dotted in found:
                package, _, inner = dotted.partition(".")
                if package == CORE.name:
                    # `from kvcached_core.units import MIB` is of the module, not of what is in it.
                    graph[name].add(inner if inner in modules else inner.rpartition(".")[0])
    return graph


def num_layers(graph: Graph) -> int:
    """Return how many modules the longest chain of imports has.

    Raises:
        graphlib.CycleError: If some import each other.
    """
    depth: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        depth[name] = 1 + max((depth[other] for other in graph.get(name, ())), default=0)
    return max(depth.values())


def place(name: str) -> str:
    return name.partition(".")[0]


def imported_by(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield file, node.module.partition(".")[0]
            elif isinstance(node, ast.Import):
                yield from ((file, alias.name.partition(".")[0]) for alias in node.names)


def test_importing_the_core_loads_neither_torch_nor_an_engine_nor_pydantic() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "vllm", "sglang", "pydantic", "rich", "typer", "numpy"}
    assert heavy & set(json.loads(done.stdout)) == set()


def test_dependencies_point_one_way() -> None:
    ours = set(PACKAGES)
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for package, folder in PACKAGES.items()
        for file, module in imported_by(folder)
        if module in ours - MAY_IMPORT[package]
    ]
    assert wrong == []


def test_the_core_imports_no_engine() -> None:
    engines = {"vllm", "sglang"}
    assert [
        file for file, module in imported_by(PACKAGES["kvcached_core"]) if module in engines
    ] == []


def test_folders_of_the_core_import_one_way() -> None:
    assert {place(name) for name in core_modules() if name} == set(CORE_MAY_IMPORT)
    wrong = [
        f"{name} imports {other}"
        for name, others in core_graph().items()
        for other in others
        if other and place(other) != place(name)
        if place(other) not in CORE_MAY_IMPORT[place(name)]
        if (name, other) not in ARROWS_BESIDE
    ]
    assert wrong == []


def test_every_arrow_beside_the_table_is_still_there() -> None:
    graph = core_graph()
    assert [(name, other) for name, other in ARROWS_BESIDE if other not in graph[name]] == []


def test_the_rules_never_see_shared_memory() -> None:
    graph = core_graph()
    assert graph["ledger.policy"] <= {*BOTTOM, "ledger.standing"}
    assert graph["ledger.standing"] <= BOTTOM


def test_no_modules_of_the_core_import_each_other() -> None:
    assert num_layers(core_graph()) > 1


def test_a_circle_of_imports_is_found() -> None:
    with pytest.raises(graphlib.CycleError):
        num_layers({"one": {"two"}, "two": {"one"}})


def test_the_core_has_few_layers_inside_each_folder_and_between_them() -> None:
    graph = core_graph()
    layers = {
        folder: num_layers(
            {
                name: {other for other in others if place(other) == folder}
                for name, others in graph.items()
                if place(name) == folder
            }
        )
        for folder in CORE_MAY_IMPORT
    }
    layers["between"] = num_layers(CORE_MAY_IMPORT)
    assert {folder: num for folder, num in layers.items() if num > MAX_LAYERS} == {}


def test_the_top_of_the_core_has_few_entries() -> None:
    entries = [
        entry.name
        for entry in CORE.iterdir()
        if (entry.is_file() and entry.suffix == ".py") or any(entry.glob("*.py"))
    ]
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


def test_modules_of_the_core_are_short() -> None:
    found = {
        str(file.relative_to(CORE))
        for file in CORE.rglob("*.py")
        if len(file.read_text().splitlines()) > MAX_LINES
    }
    assert found == set()


def test_folders_say_in_one_line_what_they_are() -> None:
    assert [
        file for file in CORE.rglob("*/__init__.py") if len(file.read_text().splitlines()) > 1
    ] == []


def test_no_two_test_files_have_one_name() -> None:
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == []  # pytest imports them flat
