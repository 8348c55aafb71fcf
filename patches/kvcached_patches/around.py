"""Hooks as plain functions of the original and its arguments."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Value = TypeVar("Value")

# Where an engine's object has what is ours of it, if there is something.
OURS = "kvcached"


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


def around_found(find: Callable[[Any], Any]) -> Callable[..., Any]:
    """Let `hook(call, ours, self)` stand in for a method where `find(self)` has something of ours.

    `call()` runs the original with every argument. Where nothing is found it runs alone.
    """

    def decorate(hook: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        @functools.wraps(hook)
        def replace(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
                ours = find(self)
                if ours is None:
                    return original(self, *args, **kwargs)
                return hook(functools.partial(original, self, *args, **kwargs), ours, self)

            return wrapper

        return replace

    return decorate


# For a method of an object that has something of ours.
around_ours = around_found(lambda engines: getattr(engines, OURS, None))


@contextmanager
def setting(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """Let a hook inside another one read what the outer one knows."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
