"""What is said, and done, where an engine cannot be served elastically."""

import logging
import os
from collections.abc import Iterable

from kvcached_core.config import SWITCH, Enable, read_switch
from kvcached_core.errors import UnsupportedEngineError


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
