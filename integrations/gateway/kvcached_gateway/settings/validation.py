"""Tables of a file against what they may hold: pydantic's findings in plain words."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvcached_gateway.settings.mistakes import Mistake, Path, nearest

# What may stand where a value has another kind, by pydantic's names for mistakes.
_ALLOWED = {
    "int_parsing": "write a whole number",
    "int_type": "write a whole number",
    "float_parsing": "write a number",
    "float_type": "write a number",
    "finite_number": "write a number",
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "string_type": "write text",
    "string_too_short": "it must not be empty",
    "tuple_type": "write a list such as [first, second]",
    "dict_type": "write a table of settings",
    "model_type": "write a table of settings",
    "path_type": "write a path",
}


def table(values: Any, here: Path, keys: Iterable[str] | None) -> dict[str, Any]:
    """Return a table without the keys that say nothing.

    Args:
        values: What stands there.
        here: Where that is.
        keys: The keys that it may have, or None for any.

    Raises:
        Mistake: If it is none, or has another key.
    """
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise Mistake(here or ("the file",), "has to be a table of settings")
    known = list(values if keys is None else keys)
    for key in values:
        if key not in known:
            raise Mistake((*here, key), f"is not a setting; {nearest(key, known)}")
    # A name without settings is one with the defaults; a setting without a value is not there.
    return {key: value for key, value in values.items() if keys is None or value is not None}


def mistakes(error: ValidationError) -> list[Mistake]:
    """Return all mistakes that were found, in the order of the fields."""
    return [_mistake(problem) for problem in error.errors() if not _is_other_way(problem)]


def first_mistake(error: ValidationError) -> Mistake:
    """Return the first mistake that was found."""
    return mistakes(error)[0]


def _is_other_way(problem: ErrorDetails) -> bool:
    """Return whether it says that a list is not the one word that could stand in its place."""
    return str(problem["loc"][-1]).startswith("literal[")


def _mistake(problem: ErrorDetails) -> Mistake:
    kind, context = problem["type"], problem.get("ctx", {})
    path = problem["loc"]
    if path[-1:] == ("[key]",):
        return Mistake(path[:-1], f"is no name: {context['error']}")
    if kind == "missing":
        return Mistake(path, "is missing")
    if kind == "value_error":
        text = str(context["error"])
    elif kind == "literal_error":
        text = f"use {context['expected']}"
        names = re.findall(r"'([^']*)'", context["expected"])
        near = nearest(str(problem["input"]), names)
        text += f"; {near}" if near.startswith("did") else ""
    elif kind in _ALLOWED:
        text = _ALLOWED[kind]
    else:
        text = f"it must be {problem['msg'].removeprefix('Input should be ')}"
    if path[-1] == "key_env":  # whoever wrote a key there does not want to read it in a log
        return Mistake(path, f"is not allowed; {text}")
    return Mistake(path, text, problem["input"])
