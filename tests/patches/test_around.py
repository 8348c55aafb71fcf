"""A hook around a function gets it first, and whoever looks at it sees the engine's function."""

import inspect
from typing import Any

from kvcached_patches.around import around


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
