"""The core stays light, and dependencies point one way."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
}
MAY_IMPORT = {
    "kvcached_core": {"kvcached_core"},
    "kvcached_patches": {"kvcached_patches"},
    "kvcached_vllm": {"kvcached_vllm", "kvcached_core", "kvcached_patches"},
    "kvcached_sglang": {"kvcached_sglang", "kvcached_core", "kvcached_patches"},
}


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
