"""Names of instances that are made of any text."""

import re
from collections.abc import Iterator

from kvcached_core.units import MAX_NAME_LENGTH

MAX_NUMBER = 100
_OTHER = re.compile(r"[^A-Za-z0-9._-]+")


def safe_name(text: str, suffix: str = "") -> str:
    """Return a name made of `text`, with `suffix` behind it."""
    name = _OTHER.sub("-", text).lstrip("._-") or "engine"
    return name[: MAX_NAME_LENGTH - len(suffix)] + suffix


def rank_name(name: str, data_rank: int) -> str:
    """Return what a rank of data parallelism is called: the first one `name`, the others after it.

    Args:
        name: The server's name.
        data_rank: The rank's number, from 0 on.
    """
    return safe_name(name, f"-dp{data_rank}") if data_rank else name


def numbered_names(name: str) -> Iterator[str]:
    """Yield `name`, and then the same with a number behind it, as many as instances can be."""
    yield name
    yield from (safe_name(name, f"-{number}") for number in range(2, MAX_NUMBER + 1))
