"""A hook fits or does not, by the engine's source alone."""

from pathlib import Path

import pytest

from kvcached_patches import Hook
from kvcached_patches.check import check_hooks, choose_targets, compare, describe_hooks
from kvcached_patches.sources import Folder

SOURCE = """
from elsewhere import Imported as Renamed

try:
    import fast
except ImportError:
    fast = None

if True:
    def conditional(first, *, second=1):
        pass

class Owner:
    limit: int = 3

    async def method(self, request, /, tokens):
        pass
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    package = tmp_path / "engine"
    package.mkdir()
    (package / "__init__.py").write_text("top = 1\n")
    (package / "core.py").write_text(SOURCE)
    return tmp_path


def findings(root: Path, target: str, *parameters: str) -> list[str]:
    hook = Hook(target, "x:y", "why", parameters)
    return [str(found) for found in check_hooks([hook], Folder(root))]


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        ("engine.core:Owner.method", ("request", "tokens")),
        ("engine.core:conditional", ("first", "second")),
        ("engine.core:Renamed", ()),
        ("engine.core:fast", ()),
        ("engine.core:Owner.limit", ()),
        ("engine:top", ()),
    ],
)
def test_what_is_there_fits(root: Path, target: str, parameters: tuple[str, ...]) -> None:
    assert findings(root, target, *parameters) == []


@pytest.mark.parametrize(
    ("target", "parameters", "problem"),
    [
        ("engine.gone:Owner", (), "the module is gone"),
        ("engine.core:Gone.method", (), "Gone is not defined there"),
        ("engine.core:Owner.gone", (), "gone is not defined there"),
        ("engine.core:Imported", (), "Imported is not defined there"),
        ("engine.core:Owner.method", ("request", "num_tokens"), "it has no parameter num_tokens"),
        ("engine.core:Owner.method", ("requests", "tokens"), "it has no parameter requests"),
        ("engine.core:Owner", ("request",), "it is not a function"),
    ],
)
def test_drift_is_found_and_named(
    root: Path, target: str, parameters: tuple[str, ...], problem: str
) -> None:
    assert findings(root, target, *parameters) == [f"{target}: {problem}"]


def test_the_first_target_that_is_there_is_chosen(root: Path) -> None:
    sources = Folder(root)
    targets = ("engine.core:Owner.gone", "engine.core:Owner.method", "engine:top")
    hook = Hook("engine.moved:new", "x:y", "why", (), targets)
    (chosen,) = choose_targets([hook], sources)
    assert chosen.target == "engine.core:Owner.method"
    assert check_hooks([chosen], sources) == []
    gone = Hook("engine.moved:new", "x:y", "why", (), ("engine.too:gone",))
    assert [str(found) for found in check_hooks(choose_targets([gone], sources), sources)] == [
        "engine.moved:new: the module is gone"
    ]


def test_what_a_lock_has_and_the_source_has_not_is_found(root: Path) -> None:
    hooks = [Hook("engine.core:Owner.method", "x:y", "why"), Hook("engine:top", "x:y", "why")]
    known = describe_hooks(hooks, Folder(root))
    (root / "engine/core.py").write_text("")
    left = describe_hooks(hooks, Folder(root))
    for exactly in (False, True):
        found = compare(hooks, known, left, exactly=exactly)
        assert [str(one) for one in found] == ["engine.core:Owner.method: it is not there"]
        assert compare(hooks, known, known, exactly=exactly) == []
