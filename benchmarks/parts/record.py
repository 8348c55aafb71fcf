"""How a benchmark is called, and the record that it writes."""

import argparse
import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.machine import describe_gpu, describe_machine


@dataclass
class Record:
    """The results of a run, written whenever something was added: a run may be cut off.

    Whoever reads the file meanwhile finds all of what was written before, or all of it now.
    """

    path: Path
    results: dict[str, Any] = field(default_factory=dict)

    def add(self, **results: Any) -> None:
        """Add results and write all there are."""
        self.results |= results
        write(self.path, self.results)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results to a file, in a folder that is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(results, indent=2) + "\n")
    new.replace(path)


def shown(results: dict[str, Any]) -> str:
    """Return all results but the machine, as text."""
    return json.dumps({key: results[key] for key in results if key != "machine"}, indent=2)


def command_line(description: str | None, *, can_rehearse: bool = False) -> argparse.ArgumentParser:
    """Return what reads a command line; a benchmark's own arguments are added to it."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, required=True, help="the results go there")
    if can_rehearse:
        made.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    return made


def begin_record(options: argparse.Namespace) -> Record:
    """Begin the record of a run that may be a rehearsal, and let a signal end it in order."""
    end_by_signals(signal.SIGTERM)
    record = Record(options.json)
    record.add(machine=describe_machine() if options.tiny else describe_gpu())
    return record


def end_by_signals(*numbers: signal.Signals) -> None:
    """Let these signals end this program as an error would: what it has started is ended, too."""
    for number in numbers:
        signal.signal(number, lambda number, _: sys.exit(f"ended by {signal.Signals(number).name}"))
