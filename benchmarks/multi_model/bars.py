"""What was aimed at before it was measured: bars for a ratio of ours to another's, or for ours."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from multi_model.compared import FIGURES
from multi_model.errors import ModeError
from multi_model.modes import MODES
from parts.intervals import AT_LEAST, AT_MOST

FORM = re.compile(r"([^/]+)/(\w+?)(?:/([\w-]+))?(<=|>=)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Bar:
    """A bar for our figure, or for it divided by another mode's.

    Attributes:
        workload: The workload's words, as the command line names it.
        figure: One of `compared.FIGURES`.
        other: The mode that ours is compared with; nothing where the figure itself has a bar.
        relation: `<=` or `>=`.
        value: What it has to be at most, or at least; a figure in its own unit, ms or %.
    """

    workload: str
    figure: str
    other: str
    relation: str
    value: float


def read_bar(words: str) -> Bar:
    """Return the bar that `WORKLOAD/FIGURE/MODE<=NUMBER` names; `>=` asks for at least that.

    Without `/MODE` it is a bar for our figure itself.

    Raises:
        ModeError: If it is none; the message says what is allowed.
    """
    match = FORM.fullmatch(words)
    if not match:
        relations = f"{AT_MOST} or {AT_LEAST}"
        form = f"WORKLOAD/FIGURE[/MODE]{relations}NUMBER"
        raise ModeError(f"bar {words!r} is not of the form {form}")
    workload, figure, other, relation, value = match.groups(default="")
    for kind, found, known in (("figure", figure, FIGURES), ("mode", other, MODES)):
        if found and found not in known:
            raise ModeError(f"bar {words!r}: {kind} {found!r} is not one of {', '.join(known)}")
    return Bar(workload, figure, other, relation, float(value))


def of_workload(bars: Sequence[Bar], words: str) -> list[dict[str, Any]]:
    """Return the bars of one workload as the run's folder keeps them."""
    return [asdict(bar) for bar in bars if bar.workload == words]
