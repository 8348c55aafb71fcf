"""What is byte for byte the locked file is not parsed, and nothing else is served for it."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from kvcached_patches import Hook, locks
from kvcached_patches.check import choose_targets, describe_hooks
from kvcached_patches.engines import DISTRIBUTIONS
from kvcached_patches.hook import OVERRIDE, uses
from kvcached_patches.locks import Lock, examine, locked_releases, read_lock
from kvcached_patches.sources import Folder
from kvcached_patches.unchanged import describe_files, fits

CORE = """
class Owner:
    def method(self, request, *, tokens: int = 1):
        return tokens

    def swapped(self):
        return 1
"""
PARTS = "class Part:\n    size = 1\n"
HOOKS = (
    Hook("engine.core:Owner.method", "x:y", "why", ("request", "tokens")),
    Hook("engine.core:Owner.swapped", "x:y", "why", how=OVERRIDE),
    Hook("engine.new:Part.size", "", "why", alternatives=("engine.parts:Part.size",)),
    *uses("our code looks", "engine.parts:Part.count", "engine.none:Part", is_optional=True),
)


class Looked(Folder):
    """An engine that says which of its modules were parsed."""

    @property
    def parsed(self) -> list[str]:
        return sorted(self._trees)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "FOLDER", tmp_path / "locks")


def engine(root: Path, core: str = CORE, parts: str = PARTS, **more: str) -> Looked:
    package = root / "engine"
    package.mkdir(exist_ok=True)
    for name, text in {"core": core, "parts": parts, **more}.items():
        (package / f"{name}.py").write_text(text)
    return Looked(root)


def write_lock(sources: Folder) -> Lock:
    symbols = describe_hooks(choose_targets(HOOKS, sources), sources)
    made = Lock("engine", "1.0.0", "", symbols, describe_files(HOOKS, sources))
    made.write()
    return made


def found_in(sources: Folder, hooks: tuple[Hook, ...] = HOOKS) -> list[str]:
    return [str(found) for found in examine(hooks, "engine", "1.0.0", sources)]


def test_a_release_that_is_the_locked_one_is_not_parsed(tmp_path: Path) -> None:
    made = write_lock(engine(tmp_path))
    assert made.files["engine.new"].digest == ""
    assert made.files["engine.parts"].lacks == ("Part.count",)
    sources = engine(tmp_path)
    assert found_in(sources) == []
    assert sources.parsed == []


@pytest.mark.parametrize(
    ("changed", "parsed"),
    [
        ({"core": CORE.replace("return tokens", "return 2 * tokens")}, ["core"]),
        ({"core": CORE.replace("tokens:", "num_tokens:")}, ["core"]),
        ({"core": CORE.replace("tokens: int = 1", "tokens: int = 2")}, ["core"]),
        ({"core": CORE.replace("return 1", "return 2")}, ["core"]),
        ({"core": CORE.replace("swapped", "renamed")}, ["core"]),
        ({"parts": PARTS.replace("size", "bytes")}, ["new", "parts"]),
        ({"parts": PARTS + "    count = 2\n"}, ["new", "parts"]),
        ({"new": "class Part:\n    pass\n"}, ["new", "parts"]),
        ({"new": PARTS}, ["new"]),
        ({"none": PARTS}, ["none"]),
        ({"none": "", "core": CORE + "\n"}, ["core", "none"]),
    ],
)
def test_a_changed_file_is_parsed_alone_and_told_of_as_if_all_were(
    tmp_path: Path, changed: dict[str, str], parsed: list[str]
) -> None:
    made = write_lock(engine(tmp_path))
    sources = engine(tmp_path, **changed)
    found = found_in(sources)
    assert sources.parsed == [f"engine.{name}" for name in parsed]
    replace(made, files={}).write()
    assert found_in(sources) == found


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        (Hook("engine.core:Owner", "x:y", "why"), "the lock does not have it; lock again"),
        (
            Hook("engine.core:Owner", "x:y", "why", is_optional=True),
            "the lock does not have it; lock again",
        ),
        (
            Hook("engine.parts:Part", "x:y", "why", alternatives=("engine.core:Owner.method",)),
            "the lock does not have it; lock again",
        ),
        (replace(HOOKS[0], parameters=("request", "more")), "it has no parameter more"),
        (replace(HOOKS[1], parameters=("self", "more")), "it has no parameter more"),
        (Hook("engine.parts:Part", "x:y", "why", ("size",)), "it is not a function"),
        (Hook("engine.parts:Part.count", "x:y", "why"), "count is not defined there"),
        (Hook("engine.none:Part", "x:y", "why"), "the module is gone"),
    ],
)
def test_what_a_lock_does_not_know_is_looked_for_though_the_file_is_the_locked_one(
    tmp_path: Path, hook: Hook, problem: str
) -> None:
    write_lock(engine(tmp_path))
    sources = engine(tmp_path)
    assert found_in(sources, (hook,)) == [f"{hook.target}: {problem}"]
    assert sources.parsed


def test_a_lock_without_a_file_lets_it_be_parsed(tmp_path: Path) -> None:
    made = write_lock(engine(tmp_path))
    replace(made, files={"engine.core": made.files["engine.core"]}).write()
    sources = engine(tmp_path)
    assert found_in(sources) == []
    assert "engine.parts" in sources.parsed
    assert "engine.core" not in sources.parsed


def test_each_lock_in_the_package_says_of_every_hook_whether_it_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    for distribution, served in DISTRIBUTIONS.items():
        for release in locked_releases(distribution):
            lock = read_lock(distribution, release)
            assert lock is not None
            modules = lock.files.keys()
            unknown = [
                hook.target
                for hook in served.locked
                if not fits(hook, lock.symbols, lock.files, modules.__contains__)
            ]
            assert unknown == [], f"{lock.path.name}: run python -m kvcached_patches relock"


def test_the_signatures_of_locks_read_as_the_functions_they_are_of() -> None:
    source = "def f(self, a, /, b: int = 1, *c, d: 'x' = {1: 2}, **e): pass"
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    symbol = locks.Symbol(f"({ast.unparse(function.args)})")
    for name, is_there in {"a": True, "b": True, "d": True, "c": False, "x": False}.items():
        hook = Hook("engine:f", "x:y", "why", (name,))
        assert fits(hook, {"engine:f": symbol}, {}, lambda _module: True) is is_there
