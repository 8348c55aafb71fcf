"""What commands say: in this process, and where nobody can read it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner

from kvcached_core.cli.app import app

KVCACHED = Path(sys.executable).with_name("kvcached")
ROOT = Path(__file__).parents[2]


def said(*arguments: str) -> str:
    """Return what `kvcached` says, called in this process; fail if it does not end well."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def said_to_a_full_disk(*words: str | Path, **environ: str) -> tuple[int, str]:
    """Return how a program ends whose output cannot be written, and its errors."""
    with Path("/dev/full").open("w") as full:
        return _ended(words, full.fileno(), environ)


def said_to_nobody(*words: str | Path, **environ: str) -> tuple[int, str]:
    """Return how a program ends whose output is a pipe that nobody reads any more."""
    with _pipe_without_reader() as end:
        return _ended(words, end, environ)


@contextmanager
def _pipe_without_reader() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def _ended(words: tuple[str | Path, ...], stdout: int, environ: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        words,
        env={**os.environ, **environ},
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr
