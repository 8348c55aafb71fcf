"""A hook fits or does not, by the engine's source alone."""

from pathlib import Path

import pytest

from kvcached_patches import Hook, check_hooks, choose_targets

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
    return [str(found) for found in check_hooks([Hook(target, "x:y", "why", parameters)], root)]


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
        ("engine.core:Owner", ("request",), "it is not a function"),
    ],
)
def test_drift_is_found_and_named(
    root: Path, target: str, parameters: tuple[str, ...], problem: str
) -> None:
    assert findings(root, target, *parameters) == [f"{target}: {problem}"]


def test_the_first_target_whose_module_is_there_is_chosen(root: Path) -> None:
    hook = Hook("engine.moved:new", "x:y", "why", (), ("engine.core:Owner.method", "engine:top"))
    (chosen,) = choose_targets([hook], root)
    assert chosen.target == "engine.core:Owner.method"
    assert check_hooks([chosen], root) == []
    gone = Hook("engine.moved:new", "x:y", "why", (), ("engine.too:gone",))
    assert [str(found) for found in check_hooks(choose_targets([gone], root), root)] == [
        "engine.moved:new: the module is gone"
    ]
