"""What the demo measured against its bars."""

import statistics
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from kvcached_core.units import format_bytes

if TYPE_CHECKING:
    from kvcached_demo.harness.load import Completion
    from kvcached_demo.harness.memory import Recording
    from kvcached_demo.turns import Turns

PEAKS_BAR = 1.3
IDLE_PAGES_BAR = 2


def judge(
    recording: "Recording",
    answers_by_phase: dict[str, dict[str, "list[Completion]"]],
    vanilla: dict[str, "list[Completion]"],
    pool_bytes: int,
) -> list[tuple[str, str, str, bool]]:
    """Return what, measured, bar and whether it is met."""
    peaks = [recording.peak_bytes(name) for name in vanilla]
    rows = [
        (f"peak of {name}", f"{format_bytes(peak)} ({peak / pool_bytes:.0%} of the pool)", "", True)
        for name, peak in zip(vanilla, peaks, strict=True)
    ]
    ratio = sum(peaks) / pool_bytes
    rows.append(("sum of both peaks", f"{ratio:.2f} pools", f">= {PEAKS_BAR}", ratio >= PEAKS_BAR))
    most = max(view.capacity_bytes - view.free_bytes for view in recording.views)
    rows.append(("most at one time", f"{most / pool_bytes:.2f} pools", "<= 1", most <= pool_bytes))
    answers = [
        answer for phase in answers_by_phase.values() for of in phase.values() for answer in of
    ]
    completed = sum(answer.error is None for answer in answers)
    rows.append(
        ("requests completed", f"{completed} of {len(answers)}", "all", completed == len(answers))
    )
    rows.extend(
        (f"mean time to first token, {phase}", _mean_ttft(by_engine), "", True)
        for phase, by_engine in answers_by_phase.items()
    )
    same = all(
        [answer.token_ids for answer in of] == [answer.token_ids for answer in vanilla[name]]
        for phase in answers_by_phase.values()
        for name, of in phase.items()
    )
    rows.append(("tokens identical to vanilla", "yes" if same else "no", "yes", same))
    last = recording.views[-1].instances
    pages = max(view.resident_bytes / view.page_bytes for view in last)
    rows.append(
        (
            "pages per engine when idle",
            f"{pages:.0f}",
            f"<= {IDLE_PAGES_BAR}",
            pages <= IDLE_PAGES_BAR,
        )
    )
    return rows


def judge_turns(
    found: "Turns", vanilla: dict[str, "list[Completion]"]
) -> list[tuple[str, str, str, bool]]:
    """Return what, measured, bar and whether it is met, of the models that answered in turn."""
    turns = found.turns
    needed, pool = format_bytes(found.needed_bytes), format_bytes(found.pool_bytes)
    is_too_much = found.needed_bytes > found.pool_bytes
    given_bytes = sum(turn.given_bytes for turn in turns)
    nums = {name: found.activations[name].num for name in vanilla}
    least = min(sum(turn.name == name for turn in turns) for name in vanilla) - 1  # one has them
    seconds = sum(found.activations[name].seconds for name in vanilla) / max(sum(nums.values()), 1)
    yielded = _median_seconds([turn.first for turn in turns if turn.was_yielded])
    awake = _median_seconds([turn.second for turn in turns])
    times = f"{yielded} if yielded, {awake} if not"
    back = ", ".join(f"{name} {num} times" for name, num in nums.items())
    rows = [
        ("weights of both", f"{needed} on a pool of {pool}", "> the pool", is_too_much),
        ("weights given", format_bytes(given_bytes), "> 0", given_bytes > 0),
        ("weights came back", back, f">= {least} each", min(nums.values()) >= least),
        ("a request waited for them", f"{seconds * 1000:.0f} ms in the mean", "", True),
        ("median time to first token, in turn", times, "", True),
    ]
    answers = [(turn.name, answer) for turn in turns for answer in (turn.first, turn.second)]
    completed = sum(answer.error is None for _, answer in answers)
    rows.append(
        (
            "requests completed, in turn",
            f"{completed} of {len(answers)}",
            "all",
            completed == len(answers),
        )
    )
    same = all(answer.token_ids == vanilla[name][0].token_ids for name, answer in answers)
    rows.append(("tokens identical to vanilla, in turn", "yes" if same else "no", "yes", same))
    return rows


def _median_seconds(answers: list["Completion"]) -> str:
    times = [answer.ttft_seconds for answer in answers if answer.ttft_seconds is not None]
    return f"{statistics.median(times):.2f} s" if times else "none"


def _mean_ttft(by_engine: dict[str, "list[Completion]"]) -> str:
    return ", ".join(
        f"{name} {statistics.mean(times):.2f} s"
        for name, answers in by_engine.items()
        if (times := [answer.ttft_seconds for answer in answers if answer.ttft_seconds is not None])
    )


def table(rows: list[tuple[str, str, str, bool]]) -> Table:
    """Return the rows as a table for a terminal; what is short is red."""
    table = Table(title="Two engines, one pool", title_justify="left")
    for name in ("what", "measured", "bar"):
        table.add_column(name)
    for what, measured, bar, is_met in rows:
        table.add_row(what, Text(measured, "" if is_met else "bold red"), bar)
    return table
