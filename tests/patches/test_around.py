"""A hook around a function gets it first, and whoever looks at it sees the engine's function."""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

from kvcached_patches.around import around, around_found, around_ours, setting


class Engine:
    """Something with a method to hook."""

    def step(self, tokens: int, *, is_last: bool = False) -> tuple[int, bool]:
        """Run a step."""
        return tokens, is_last


@around
def one_more(original: Any, self: Any, tokens: int, **kwargs: Any) -> tuple[int, bool]:
    """Run one token more."""
    answer: tuple[int, bool] = original(self, tokens + 1, **kwargs)
    return answer


def test_the_hook_gets_the_original_and_every_argument() -> None:
    hooked: Any = one_more(Engine.step)
    assert hooked(Engine(), 3) == (4, False)
    assert hooked(Engine(), 3, is_last=True) == (4, True)


def test_the_engines_name_signature_and_words_are_kept() -> None:
    hooked = one_more(Engine.step)
    assert inspect.signature(hooked) == inspect.signature(Engine.step)
    assert (hooked.__name__, hooked.__doc__) == ("step", "Run a step.")
    assert one_more.__doc__ == "Run one token more."


def test_a_hook_stands_in_for_several_functions_at_once() -> None:
    first: Any = one_more(Engine.step)
    second: Any = one_more(first)
    assert second(Engine(), 3) == (5, False)


@around_ours
def twice(call: Callable[[], tuple[int, bool]], ours: list[Any], self: Engine) -> Any:
    """Run a step twice."""
    ours.append(self)
    return call(), call()


noted: list[Any] = []


@around_found(lambda _self: noted or None)
def note(call: Callable[[], tuple[int, bool]], ours: list[Any], self: Engine) -> Any:
    """Note who runs a step."""
    ours.append(self)
    return call()


def test_a_hook_runs_only_where_something_is_found() -> None:
    hooked, engine = note(Engine.step), Engine()
    assert hooked(engine, 3) == (3, False)
    noted.append("something")
    assert hooked(engine, 3, is_last=True) == (3, True)
    assert noted == ["something", engine]


def test_a_hook_on_an_object_with_something_of_ours_gets_that_and_passes_every_argument_on() -> (
    None
):
    hooked, engine = twice(Engine.step), Engine()
    engine.kvcached = []  # type: ignore[attr-defined]
    assert hooked(engine, 3, is_last=True) == ((3, True), (3, True))
    assert engine.kvcached == [engine]  # type: ignore[attr-defined]
    assert inspect.signature(hooked) == inspect.signature(Engine.step)


@pytest.mark.parametrize("has_had", [True, False])
def test_on_an_object_without_anything_of_ours_the_original_runs_alone(*, has_had: bool) -> None:
    engine: Any = Engine()
    if has_had:
        engine.kvcached = None
    assert twice(Engine.step)(engine, 3, is_last=True) == (3, True)


def test_what_a_hook_sets_is_read_inside_it_alone() -> None:
    variable = ContextVar("variable", default=0)
    with setting(variable, 1):
        assert variable.get() == 1
    with pytest.raises(KeyError), setting(variable, 1):
        raise KeyError
    assert variable.get() == 0
