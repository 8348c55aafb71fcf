"""Hooks go in all or none, before or after the import, and come out in reverse."""

import functools
import importlib
import subprocess
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
    assert patcher.waits_for("toy_engine")
    patcher.revert()
    assert not patcher.waits_for("toy_engine")
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


TRACED = """
import functools

def traced(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

class Owner:
    @traced
    def method(self, value):
        return value
"""


@pytest.mark.parametrize("keeps_names", [True, False])
def test_a_second_plugin_on_the_same_method_is_refused_and_nothing_is_changed(
    engine: Callable[[], Any], *, keeps_names: bool
) -> None:
    module = engine()
    method = module.Owner.method
    if keeps_names:
        module.Owner.method = louder(method)
    else:
        module.Owner.method = lambda self, value: [method(self, value)]
    before = dict(vars(module.Owner)), dict(vars(module))
    with pytest.raises(HookError, match="wrapped by somebody else already"):
        Patcher([FUNCTION, METHOD]).apply()
    assert (dict(vars(module.Owner)), dict(vars(module))) == before


def test_who_is_told_of_a_misfit_decides_and_nothing_stays_applied(
    engine: Callable[[], Any],
) -> None:
    module = engine()
    told: list[str] = []
    missing = Hook("toy_engine:Owner.gone", HERE, "why")
    patcher = Patcher([FUNCTION, missing], on_misfit=lambda error: told.append(str(error)))
    patcher.apply()
    assert told == ["toy_engine cannot be hooked: toy_engine:Owner.gone is not defined there"]
    assert patcher.applied == []
    assert module.function() == "original"


@pytest.mark.parametrize(("num_decorators", "fits"), [(1, True), (0, False)])
def test_the_engines_own_decorators_are_known_from_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, num_decorators: int, fits: bool
) -> None:
    (tmp_path / "toy_traced.py").write_text(TRACED)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    module = importlib.import_module("toy_traced")
    hook = Hook("toy_traced:Owner.method", HERE, "why", num_decorators=num_decorators)
    try:
        Patcher([hook]).apply()
    except HookError:
        assert not fits
    else:
        assert fits
        assert module.Owner().method("a") == "aa"
    finally:
        sys.modules.pop("toy_traced")


def test_applied_reverted_and_applied_again_in_a_new_process(tmp_path: Path) -> None:
    (tmp_path / "toy_engine.py").write_text(ENGINE)
    script = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]
from kvcached_patches import Hook, Patcher
hook = Hook("toy_engine:Owner.method", "test_apply:louder", "why")
if sys.argv[1] == "after":
    import toy_engine
answers = []
for _ in range(2):
    patcher = Patcher([hook])
    patcher.apply()
    import toy_engine
    answers.append(toy_engine.Owner().method("a"))
    patcher.revert()
    answers.append(toy_engine.Owner().method("a"))
print(answers)
"""
    for order in ("before", "after"):
        done = subprocess.run(
            [sys.executable, "-c", script, order], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "['aa', 'a', 'aa', 'a']"
