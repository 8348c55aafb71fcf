"""What is said, and done, where an engine cannot be served elastically."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator

from kvcached_core.config import SWITCH, Enable, read_switch
from kvcached_core.errors import GeometryError, KVCachedError, UnsupportedEngineError


def refuse(error: UnsupportedEngineError, *, engine: str, logger: logging.Logger) -> None:
    """End the process with a report, or say under `auto` that it goes on without us.

    The processes that this one starts go on without us, too.

    Args:
        error: Why it cannot be served.
        engine: The engine's name.
        logger: Where the warning goes; an engine shows only its own.

    Raises:
        SystemExit: With the report; plugin loaders and engines catch exceptions.
    """
    if read_switch() is Enable.AUTO:
        os.environ[SWITCH] = "0"
        logger.warning("kvcached is off, %s serves unpatched: %s", engine, error)
        return
    raise SystemExit(f"kvcached: {error}") from error


@contextlib.contextmanager
def one_message(engine: str) -> Iterator[None]:
    """End the process with one message where a start fails inside, under `auto` as well.

    For what comes after an engine was told sizes of ours. It cannot go on unpatched any more: its
    own KV cache would take the virtual size, which is about the whole device. What arguments and
    the model's configuration can tell is refused earlier, by `refuse`.

    Args:
        engine: The engine's name.

    Raises:
        SystemExit: In the place of every error of ours.
    """
    try:
        yield
    except (GeometryError, UnsupportedEngineError) as error:
        raise SystemExit(
            f"kvcached: {error}\n"
            f"  {engine} chose its sizes for elastic pages already, so ENABLE_KVCACHED=auto cannot "
            "go on without them; set ENABLE_KVCACHED=0 for this model"
        ) from error
    except KVCachedError as error:
        raise SystemExit(f"kvcached: {error}") from error


def check_configuration(reasons: Iterable[str]) -> None:
    """Refuse a configuration for which there are reasons.

    Raises:
        UnsupportedEngineError: With every reason and the setting to change.
    """
    lines = "".join(f"\n  - {reason}" for reason in reasons)
    if lines:
        raise UnsupportedEngineError(
            f"this configuration cannot be served elastically: {lines}\n"
            "  change it, or set ENABLE_KVCACHED=auto or 0"
        )
