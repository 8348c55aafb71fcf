"""Pairs of engines on a GPU, each in a process of its own: a vanilla one and ours."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest


class Runs:
    """What engines report, started when their case is asked for.

    Args:
        folder: For what they leave, and for a file that says in brief what each reported.
        run: Runs an engine of the case with this name, ours if it is `elastic`.
        num_at_once: How many run at a time.
    """

    def __init__(self, folder: Path, run: Callable[..., Any], num_at_once: int) -> None:
        self.folder = folder
        self._run = run
        self._pool = ThreadPoolExecutor(num_at_once)
        self._futures: dict[tuple[str, bool], Future[Any]] = {}

    def start(self, name: str) -> None:
        """Run both engines of a case as soon as there is room for them."""
        for elastic in (False, True):
            self._futures[name, elastic] = self._pool.submit(
                self._run, self.folder, name, elastic=elastic
            )

    def reports(self, name: str) -> tuple[Any, Any]:
        """Return what both engines of a case reported, vanilla's first."""
        return self._futures[name, False].result(), self._futures[name, True].result()

    def close(self) -> None:
        """Start no more of them, and wait for those that run."""
        self._pool.shutdown(cancel_futures=True)


def runs_of(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    run: Callable[..., Any],
    num_at_once: int,
) -> Iterator[Runs]:
    """Start the cases of all tests of a module that are asked for, by their parameter `name`."""
    folder = os.environ.get("GPU_CHECK_FOLDER")
    made = Runs(Path(folder) if folder else tmp_path_factory.mktemp("engines"), run, num_at_once)
    params = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
    ]
    for name in dict.fromkeys(each["name"] for each in params if "name" in each):
        made.start(name)
    yield made
    made.close()


def write_brief(folder: Path, label: str, brief: dict[str, Any]) -> None:
    """Keep what an engine reported, in brief."""
    (folder / f"{label}.json").write_text(json.dumps(brief, indent=2))
