"""Names of instances: what is allowed, and a name made of any text."""

import re
from collections.abc import Iterator

from kvcached_core.errors import ConfigError

MAX_LENGTH = 64
MAX_NUMBER = 100
_ALLOWED = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_LENGTH - 1}}}")
_OTHER = re.compile(r"[^A-Za-z0-9._-]+")


def check_name(name: str, what: str = "name") -> None:
    """Refuse what is no name of an instance.

    Args:
        name: The name.
        what: The setting or option that it came from, for the message.

    Raises:
        ConfigError: With what is allowed.
    """
    if not _ALLOWED.fullmatch(name):
        raise ConfigError(
            f"{what}={name!r} is not allowed; use letters, digits, '.', '_' and '-', up to "
            f"{MAX_LENGTH}, starting with a letter or digit"
        )


def safe_name(text: str, suffix: str = "") -> str:
    """Return a name made of `text`, with `suffix` behind it."""
    name = _OTHER.sub("-", text).lstrip("._-") or "engine"
    return name[: MAX_LENGTH - len(suffix)] + suffix


def numbered_names(name: str) -> Iterator[str]:
    """Yield `name`, and then the same with a number behind it, as many as instances can be."""
    yield name
    yield from (safe_name(name, f"-{number}") for number in range(2, MAX_NUMBER + 1))
