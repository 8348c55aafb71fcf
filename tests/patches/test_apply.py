"""Hooks go in all or none, before or after the import, and come out in reverse."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached_patches import Hook, HookError, Patcher

ENGINE = """
class Base:
    def inherited(self):
        return "inherited"

class Owner(Base):
    def method(self, value):
        return value

def function():
    return "original"
"""


def louder(original: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement for the tests: what the original says, twice."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) * 2

    return wrapper


HERE = f"{__name__}:louder"
METHOD = Hook("toy_engine:Owner.method", HERE, "why")
FUNCTION = Hook("toy_engine:function", HERE, "why")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    (tmp_path / "toy_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield lambda: importlib.import_module("toy_engine")
    sys.modules.pop("toy_engine", None)


@pytest.mark.parametrize("imported_first", [True, False])
def test_hooks_apply_before_and_after_the_import(
    engine: Callable[[], Any], *, imported_first: bool
) -> None:
    if imported_first:
        engine()
    patcher = Patcher([METHOD, FUNCTION])
    patcher.apply()
    patcher.apply()
    module = engine()
    assert (module.Owner().method("a"), module.function()) == ("aa", "originaloriginal")
    assert patcher.applied == [METHOD.target, FUNCTION.target]
    assert module.__spec__.loader is module.__loader__
    patcher.revert()
    assert (module.Owner().method("a"), module.function()) == ("a", "original")


def test_revert_before_the_import_leaves_the_module_alone(engine: Callable[[], Any]) -> None:
    finders = list(sys.meta_path)
    patcher = Patcher([METHOD])
    patcher.apply()
    patcher.revert()
    assert sys.meta_path == finders
    assert engine().Owner().method("a") == "a"


@pytest.mark.parametrize("missing", ["toy_engine:Owner.gone", "toy_engine:Owner.inherited"])
def test_one_misfit_means_none_is_applied(engine: Callable[[], Any], missing: str) -> None:
    module = engine()
    before = dict(vars(module.Owner)), dict(vars(module))
    with pytest.raises(HookError, match=missing):
        Patcher([FUNCTION, METHOD, Hook(missing, HERE, "why")]).apply()
    assert (dict(vars(module.Owner)), dict(vars(module))) == before


def test_revert_under_someone_elses_wrapper_is_refused_whole(engine: Callable[[], Any]) -> None:
    module = engine()
    patcher = Patcher([FUNCTION, METHOD])
    patcher.apply()
    module.Owner.method = louder(module.Owner.method)
    with pytest.raises(HookError, match=r"someone else's wrapper: toy_engine:Owner\.method"):
        patcher.revert()
    assert module.function() == "originaloriginal"
    assert module.Owner().method("a") == "aaaa"
