"""Run as a script: starts of vLLM in this process fail, at one place after the other.

Arguments: a model folder, and a JSON object with `places`. It says which starts failed, and ends
only if nothing is left of any.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers.offline import ENGINE_OPTIONS
from helpers.waiting import await_that
from kvcached_core.config import read_config
from kvcached_core.errors import LedgerError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.arena import Arena


class PlantedError(Exception):
    """What ends a start."""


def fail(*_args: Any, **_kwargs: Any) -> Any:
    """Stand in for what ends a start."""
    raise PlantedError


def left_behind() -> list[str]:
    """Return the engines in the ledgers, and the arenas with memory."""
    gc.collect()
    names = [
        instance.name
        for path in read_config().dir.glob("*.ledger")
        for instance in _instances(path)
    ]
    arenas = [one for one in gc.get_objects() if isinstance(one, Arena) and one.resident_bytes]
    return [*names, *(f"{arena.resident_bytes} bytes" for arena in arenas)]


def _instances(path: Path) -> Any:
    try:
        with Ledger(path) as ledger:
            return ledger.view().instances
    except LedgerError:  # it went with the last engine in it
        return ()


def main() -> None:
    """Let each start fail, wait for what it held to go, report them at last."""
    model, options = sys.argv[1], json.loads(sys.argv[2])

    from vllm import LLM

    failed = []
    for place in options["places"]:
        with patch(place, fail):
            try:
                LLM(model, **ENGINE_OPTIONS)
            except PlantedError:
                failed.append(place)
        await_that(lambda: not left_behind())
    print(json.dumps({"failed": failed}))


if __name__ == "__main__":
    main()
