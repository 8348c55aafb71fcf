"""What `python -m kvcached_patches` prints to a full disk, and to a reader that has left."""

import sys

import pytest
from helpers.commands import said_to_a_full_disk, said_to_nobody

COMMAND = (sys.executable, "-m", "kvcached_patches")


@pytest.mark.parametrize("command", ["show", "runs", "aliases", "--help"])
def test_output_that_cannot_be_written_is_told_in_one_line(command: str) -> None:
    assert said_to_a_full_disk(*COMMAND, command) == (
        1,
        "kvcached_patches: what it prints cannot be written: No space left on device\n",
    )
    assert said_to_nobody(*COMMAND, command) == (1, "")
