"""A gateway's state is whole or set aside, is its owner's alone, and belongs to one gateway."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.gateway_runner import record_of

from kvcached_core.errors import LedgerError
from kvcached_gateway.engines.state_file import Folder
from kvcached_gateway.errors import GatewayRunningError, StateFileError
from kvcached_gateway.settings import files

OTHER = """
import sys
from pathlib import Path
from kvcached_gateway.errors import GatewayRunningError
from kvcached_gateway.engines.state_file import Folder
try:
    Folder(Path(sys.argv[1]))
except GatewayRunningError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with Folder(tmp_path) as opened:
        yield opened


def test_what_was_written_is_read_by_the_next_one(tmp_path: Path) -> None:
    records = [record_of("a"), replace(record_of("b"), devices=("GPU-1", "GPU-2"), token="")]
    with Folder(tmp_path) as first:
        assert first.read() == []
        first.write(records)
    with Folder(tmp_path) as second:
        assert second.read() == records
        second.write(records[:1])
        assert second.read() == records[:1]


def test_nobody_else_can_read_it(folder: Folder) -> None:
    folder.write([record_of()])
    for path in folder.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert "Bearer key" in (folder.path / "gateway.json").read_text()


def test_the_folder_of_the_ledgers_is_made_as_engines_need_it(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    with Folder(directory):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o755)
    with pytest.raises(LedgerError, match="is open to other users"):
        Folder(directory)


def test_a_second_gateway_is_refused_with_the_first_one_s_process(
    folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(GatewayRunningError, match=f"process {os.getpid()} serves from"):
        Folder(tmp_path)
    other = subprocess.run(
        [sys.executable, "-c", OTHER, tmp_path], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert f"process {os.getpid()} serves from" in other.stderr
    folder.close()
    with Folder(tmp_path):
        pass
    folder._lock = os.open(os.devnull, os.O_RDONLY)  # the fixture closes it once more


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"version": 2, "engines": []}',
        b'{"version": 1, "engines": [{}]}',
        b'{"version": 1, "engines": [1]}',
        b'{"version": 1, "engines": null}',
    ],
)
def test_a_broken_one_is_set_aside_and_said(folder: Folder, text: bytes) -> None:
    file = folder.path / "gateway.json"
    file.write_bytes(text)
    with pytest.raises(StateFileError, match=r"is broken .* it is .*gateway\.broken now"):
        folder.read()
    assert file.with_suffix(".broken").read_bytes() == text
    assert folder.read() == []


def test_a_write_that_fails_leaves_what_was_there(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write([record_of()])

    def full(descriptor: int, *_: object) -> None:
        os.close(descriptor)
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="no space"):
        folder.write([])
    monkeypatch.undo()
    assert folder.read() == [record_of()]
    folder.write([])
    assert folder.read() == []
