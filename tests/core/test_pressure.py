"""A bell is heard, and leaves nothing behind."""

import errno
import socket
import stat
import sys
import threading
import time
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers.waiting import await_that

from kvcached_core.config import HOST, read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.errors import LedgerError
from kvcached_core.ledger.bell import Doorbell, ring, wake
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import doorbell_path
from kvcached_core.memory.devices import Device, open_ledger


def test_a_ring_that_fails_is_logged_and_the_next_one_is_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard, failures = threading.Event(), [KeyError("planted"), None]

    def on_ring() -> None:
        if failure := failures.pop(0):
            raise failure
        heard.set()

    bell = Doorbell(tmp_path / "a.sock", on_ring)
    for _ in range(2):
        assert ring(bell.path)
    assert heard.wait(30)
    bell.close()
    assert f"a ring at {bell.path} could not be answered" in caplog.text
    assert "planted" in caplog.text


def test_a_ring_is_heard_and_the_socket_goes_with_the_bell(tmp_path: Path) -> None:
    heard = threading.Event()
    bell = Doorbell(tmp_path / "a.sock", heard.set)
    assert stat.S_IMODE(bell.path.stat().st_mode) == 0o600
    assert ring(bell.path)
    assert heard.wait(60)
    bell.close()
    assert not bell.path.exists()
    assert not ring(bell.path)


class SettingAgain(Doorbell):
    """A bell on which an alarm rings at once, and another one is set at a line of its listening.

    Args:
        path: Where the socket lies.
        number: In front of which line, counted from the first on.

    Attributes:
        where: The line, when it has been.
        due: When the other alarm has to ring.
        rung: When there was a ring, and whether the line had been.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.where, self.due = 0, 0.0
        self.rung: list[tuple[float, int]] = []
        self._number, self._lines = number, count()
        super().__init__(path, lambda: self.rung.append((time.monotonic(), self.where)))

    def _listen(self) -> None:
        self.set_alarm(0.0)
        sys.settrace(self._trace)
        super()._listen()

    def _trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        if frame.f_code is not Doorbell._receive.__code__:
            return None
        if event == "line" and next(self._lines) == self._number:
            self.where, self.due = frame.f_lineno, time.monotonic() + 0.02
            self.set_alarm(0.02)
        return self._trace


def test_an_alarm_that_is_set_at_any_line_while_another_one_rings_is_heard(tmp_path: Path) -> None:
    seen = set()
    for number in count():
        bell = SettingAgain(tmp_path / "a.sock", number)
        await_that(lambda bell=bell: bool(bell.rung), 60)  # type: ignore[misc]
        if not bell.rung[0][1]:
            break
        await_that(lambda bell=bell: bell.rung[-1][0] >= bell.due, 60)  # type: ignore[misc]
        seen.add(bell.where)
        bell.close()
    bell.close()
    assert len(seen) >= 7


def test_a_socket_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.sock").touch()
    bell = Doorbell(tmp_path / "a.sock", lambda: None)
    assert ring(bell.path)
    bell.close()


def test_a_path_too_long_for_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="up to 107 bytes long"):
        Doorbell(tmp_path / ("x" * 120), lambda: None)


def test_a_bell_whose_folder_is_gone_still_closes(tmp_path: Path) -> None:
    bell = Doorbell(tmp_path / "a.sock", lambda: None)
    bell.path.unlink()
    closing = threading.Thread(target=bell.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()


GPU = "GPU-73e906f0-07b3-4d1c-9a2e-0123456789ab"


@pytest.mark.parametrize("device", ["host", GPU, "MIG-" + GPU[4:]])
def test_a_bell_is_heard_in_a_folder_of_80_characters(tmp_path: Path, device: str) -> None:
    folder = tmp_path / ("x" * (79 - len(str(tmp_path))))
    assert len(str(folder)) == 80
    config = read_config({"KVCACHED_DIR": str(folder)})
    heard = threading.Event()
    instance = Instance(
        [Device(HOST, device, 64)],
        config,
        name="a",
        default_name="",
        engine="test",
        on_ring=heard.set,
    )
    with Ledger(folder / f"{device}.ledger") as ledger:
        wake(ledger, [ledger.view().instances[0].row])
    assert heard.wait(60)
    instance.close()
    assert list(folder.iterdir()) == []


def test_a_folder_of_too_long_a_name_is_refused_before_anything_is_made_there(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("x" * 200)
    config = read_config({"KVCACHED_DIR": str(folder)})
    with pytest.raises(LedgerError, match=r"too long by \d+ bytes.* up to 82 bytes"):
        open_ledger(Device(HOST, GPU, 64), config)
    assert list(folder.iterdir()) == []


def test_two_gpus_have_bells_of_their_own(tmp_path: Path) -> None:
    row = RowKey(3, 1)
    other = GPU[:-1] + "c"
    paths = {doorbell_path(tmp_path / f"{name}.ledger", row) for name in (GPU, other, "host")}
    assert len(paths) == 3
    assert tmp_path / "host.3.sock" in paths


def test_ringing_makes_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = threading.Event()
    bell = Doorbell(tmp_path / "a.sock", heard.set)
    monkeypatch.setattr("socket.socket", None)
    assert ring(bell.path)
    assert heard.wait(60)
    bell.close()


def test_a_bell_that_cannot_be_made_leaves_no_socket_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[socket.socket] = []

    class Counted(socket.socket):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            made.append(self)

        def connect(self, address: object) -> None:
            raise OSError(errno.EACCES, "refused")

    monkeypatch.setattr("socket.socket", Counted)
    with pytest.raises(LedgerError, match="refused"):
        Doorbell(tmp_path / "a.sock", lambda: None)
    assert [each.fileno() for each in made] == [-1, -1]
