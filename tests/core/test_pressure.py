"""A bell is heard, and leaves nothing behind."""

import stat
import threading
from pathlib import Path

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.pressure import Doorbell, ring


def test_a_ring_is_heard_and_the_socket_goes_with_the_bell(tmp_path: Path) -> None:
    heard = threading.Event()
    bell = Doorbell(tmp_path / "a.sock", heard.set)
    assert stat.S_IMODE(bell.path.stat().st_mode) == 0o600
    assert ring(bell.path)
    assert heard.wait(5)
    bell.close()
    assert not bell.path.exists()
    assert not ring(bell.path)


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
    closing.join(5)
    assert not closing.is_alive()
