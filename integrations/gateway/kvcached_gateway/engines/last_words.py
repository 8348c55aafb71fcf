"""What an engine's log says of why it ended: its last lines, and the one that names the cause."""

import re
from pathlib import Path

__all__ = ["cause", "log_end"]

END_BYTES = 65_536
MAX_CHARACTERS = 1000
# What stands before the words of a line: the process, then the level with time and place, or the
# time alone.
PREFIX = re.compile(
    r"(\(\w+ pid=\d+\) )?"
    r"((?P<level>[A-Z]+) [\d-]+ [\d:.]+ (\[[\w./]+:\d+\] ?)?|(?P<time>\[[\d-]+ [\d:.]+[^\]]*\] ))?"
)
QUIET = {"DEBUG", "INFO", "WARNING"}
# An exception as a traceback ends with it.
RAISED = re.compile(r"([A-Za-z_]\w*\.)*\w*(Error|Exception|Exit)(: .|$)")
# What the processes around the one that failed raise: that it did, and not why.
AROUND = re.compile(
    r"Engine core initialization failed|EngineDeadError|Rank \d+ scheduler"
    r"|SystemExit|EOFError|BrokenPipeError|CancelledError"
)
OURS = "kvcached: "


def log_end(log: Path, start: int = 0) -> str:
    """Return the end of a log, of what stands behind byte `start`."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - END_BYTES))
            return file.read().decode(errors="replace").rstrip()
    except OSError:
        return ""


def cause(text: str) -> str:
    """Return what says why an engine ended; nothing where no line does.

    That is the last exception of the process that failed, with what we had to say of it. What other
    processes raise because that one is gone counts only where there is nothing else.
    """
    found = around = ""
    for line in text.splitlines():
        prefix = PREFIX.match(line)
        words = line[prefix.end() if prefix else 0 :].strip()
        # SGLang logs no level, and what it raises is behind no time.
        if prefix and (prefix["level"] in QUIET or prefix["time"]):
            continue
        if words.startswith(OURS):
            is_note = found and RAISED.match(found) and OURS not in found
            found = f"{found}; {words}" if is_note else words
        elif RAISED.match(words):
            if AROUND.search(words):
                around = words
            else:
                found = words
    return (found or around)[:MAX_CHARACTERS]
