"""Hooks as plain functions of the original and its arguments."""

import functools
from collections.abc import Callable
from typing import Any


def around(hook: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let `hook(original, *args, **kwargs)` stand in for the function that it gets as `original`.

    It costs one call more than a closure. A hook on a path that every step takes several times is
    better written as a closure.
    """

    @functools.wraps(hook)
    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        return wrapper

    return replace
