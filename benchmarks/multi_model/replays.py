"""Replays that are shown while they run, and each model's own schedule on a device of its own."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from multi_model.client import Record, replay, write_records
from multi_model.fleet import Fleet
from multi_model.modes import ALONE
from multi_model.workloads import Request, Workload
from rich.progress import Progress

QUIET_SECONDS = 2.0
# What an answer takes at most where the model has the device to itself: so long, and for a token.
ANSWER_SECONDS, TOKEN_SECONDS = 0.5, 0.01
OnDone = Callable[[Record], None]


@contextlib.contextmanager
def bar(progress: Progress, mode: str, workload: Workload) -> Iterator[OnDone]:
    """Show a replay; what is yielded is told of each request that ended."""
    task = progress.add_task(f"{mode}: {workload.name}", total=len(workload.requests))
    yield lambda _record: progress.advance(task)
    progress.stop_task(task)


@contextlib.contextmanager
def kept_if_cut_off(path: Path, on_done: OnDone) -> Iterator[OnDone]:
    """Write the requests that have ended to a file if the block does not end well.

    Args:
        path: The file. No report reads it: what is missing in it are the slowest requests.
        on_done: Told of each request, too.
    """
    ended: list[Record] = []

    def note(record: Record) -> None:
        ended.append(record)
        on_done(record)

    try:
        yield note
    except BaseException:
        write_records(path, ended)
        raise


def play_alone(
    fleet: Fleet,
    workload: Workload,
    models: Sequence[int],
    progress: Progress,
    num_played: int | None = None,
) -> list[Record]:
    """Replay the schedule of each of these models on the fleet's one server, one after the other.

    They have one kind and one shape, so one server stands for all; schedules that are the same but
    for their beginning are replayed once. Where the server would have nothing to do, time is left
    out. Each model has prompts of its own: the server's cache has those of the models before it.

    Args:
        fleet: The server.
        workload: Everybody's schedule.
        models: Those of this kind and shape.
        progress: Where it is shown.
        num_played: How many of the models are replayed, the first ones that anybody asks; in turn
            they stand for the others. None replays all.
    """
    of_each = {model: workload.of_model(model) for model in models}
    asked = [model for model, own in of_each.items() if own.requests]
    shown = asked[:num_played]
    records: list[Record] = []
    known: dict[tuple[Any, ...], list[Record]] = {}
    for model in shown:
        own = of_each[model]
        moved = closed_up(own.requests)
        if moved not in known:
            with bar(progress, ALONE, own) as on_done:
                alone = replace(own, requests=moved)
                known[moved] = asyncio.run(
                    replay(alone, fleet.targets[:1], seed=model, on_done=on_done)
                )
            time.sleep(QUIET_SECONDS)
        records += [replace(record, model=model) for record in known[moved]]
    played = list(records)
    for model, stand_in in zip(asked[len(shown) :], itertools.cycle(shown)):
        own_records = [record for record in played if record.model == stand_in]
        records += [replace(record, model=model) for record in own_records]
    return records


def closed_up(requests: Sequence[Request]) -> tuple[Request, ...]:
    """Return one model's requests, the first one at once, without times when none is answered."""
    found: list[Request] = []
    at_seconds = before = busy_until = 0.0
    for request in requests:
        at_seconds = min(at_seconds + request.at_seconds - before, busy_until)
        before = request.at_seconds
        found.append(replace(request, at_seconds=round(at_seconds, 6), model=0))
        answered = at_seconds + ANSWER_SECONDS + request.num_out * TOKEN_SECONDS
        busy_until = max(busy_until, answered)
    return tuple(found)
