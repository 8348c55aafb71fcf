"""A command whose output cannot be written says so in one line, and a reader may leave."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.commands import KVCACHED, said_to_a_full_disk, said_to_nobody

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import GIB, MIB

COMMANDS = {
    "list": ["list"],
    "list as JSON": ["list", "--json"],
    "top": ["top"],
    "top as JSON": ["top", "--json"],
    "metrics": ["metrics", "--once"],  # more than Python keeps before it writes
    "priority": ["priority", "llama", "3"],
    "help": ["--help"],
    "version": ["--version"],
}
NO_SPACE = "what it prints cannot be written: No space left on device\n"
PRINTING = """
import sys
from kvcached_core.cli.output import printing
with printing("this"):
"""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[str]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as ledger:
        ledger.register(name="llama", engine="vllm 0.32.0", page_bytes=16 * MIB)
        yield str(ledger.path.parent)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_prints_to_a_full_disk_says_so_in_one_line(
    directory: str, command: str
) -> None:
    ended = said_to_a_full_disk(KVCACHED, *COMMANDS[command], KVCACHED_DIR=directory)
    assert ended == (1, f"kvcached: {NO_SPACE}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_left_ends_a_command_without_a_word(directory: str, command: str) -> None:
    ended = said_to_nobody(KVCACHED, *COMMANDS[command], KVCACHED_DIR=directory)
    assert ended == (1, "")


@pytest.mark.parametrize("ending", ["", "    sys.exit(3)\n"])
def test_what_python_still_keeps_at_the_end_counts_too(ending: str) -> None:
    script = f"{PRINTING}    print('words')\n{ending}"
    assert said_to_a_full_disk(sys.executable, "-c", script) == (1, f"this: {NO_SPACE}")
    assert said_to_nobody(sys.executable, "-c", script) == (1, "")


@pytest.mark.parametrize("say", [said_to_a_full_disk, said_to_nobody])
def test_an_error_that_is_not_about_what_was_printed_is_told_as_it_is(
    say: Callable[..., tuple[int, str]],
) -> None:
    for error in ("OSError(28, 'full', '/a/file')", "OSError(13, 'refused')", "ValueError('x')"):
        code, text = say(sys.executable, "-c", f"{PRINTING}    raise {error}\n")
        assert code == 1
        assert "Traceback" in text


def test_output_that_somebody_closed_is_no_failure(directory: str) -> None:
    script = 'exec "$0" list >&-'
    assert said_to_nobody("sh", "-c", script, KVCACHED, KVCACHED_DIR=directory) == (0, "")
