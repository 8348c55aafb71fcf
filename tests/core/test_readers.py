"""Commands that only look take no lock: they hold no engine up, and no stopped process them."""

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import KVCACHED

from kvcached_core import control
from kvcached_core.cli.doctor import examine
from kvcached_core.cli.metrics import exposition
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.lock import FileLock
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import GIB, MIB

WRITE_LOCK = struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as ledger:
        row = ledger.register(name="llama", engine="vLLM 0.32.0", page_bytes=16 * MIB)
        ledger.promise(row, 128 * MIB, 16 * MIB)
        ledger.settle(row, mapped_bytes=128 * MIB, used_bytes=32 * MIB, cached_bytes=80 * MIB)
        yield ledger.path.parent


@pytest.fixture
def locked_folder(folder: Path) -> Iterator[Path]:
    fd = os.open(folder / "host.ledger", os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, WRITE_LOCK)
    yield folder
    os.close(fd)


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("top", "--once"), ("top", "--json"), ("metrics", "--once"), ("doctor",)],
)
def test_a_ledger_that_somebody_has_locked_can_be_seen(
    locked_folder: Path, arguments: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [KVCACHED, *arguments, "--dir", locked_folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "llama" in done.stdout


def test_what_looks_never_takes_the_lock_of_a_ledger(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []
    acquire = FileLock.acquire

    def watched(lock: FileLock, seconds: float) -> bool:
        taken.append(Path(f"/proc/self/fd/{lock._fd}").readlink())
        return acquire(lock, seconds)

    monkeypatch.setattr(FileLock, "acquire", watched)
    (device,) = control.devices(folder)
    assert device.instances[0].name == "llama"
    assert "llama" in exposition(folder)
    assert taken == []
    examine(folder)  # tries a ledger of its own, in a folder of its own
    assert taken
    assert folder not in {path.parent for path in taken}
