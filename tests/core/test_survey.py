"""One ledger that cannot be read hides none of the others; one that is gone is no problem."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core import control
from kvcached_core.errors import LedgerError
from kvcached_core.ledger import survey as surveys
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.survey import open_ledgers, survey
from kvcached_core.units import GIB


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as ledger:
        ledger.register(name="llama", engine="vLLM 0.32.0")
        yield ledger.path.parent


def test_a_ledger_that_cannot_be_read_hides_none_of_the_others(folder: Path) -> None:
    (folder / "GPU-1.ledger").write_bytes(b"nonsense")
    found = survey(folder)
    assert [view.instances[0].name for view in found.devices] == ["llama"]
    (problem,) = found.problems
    assert "GPU-1.ledger" in problem
    with pytest.raises(LedgerError, match=r"GPU-1\.ledger"):
        control.devices(folder)
    with open_ledgers(folder) as opened:
        assert [ledger.device for ledger, _ in opened.views] == ["host"]
        assert opened.problems == [problem]


def test_a_ledger_whose_last_engine_just_left_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [folder / "GPU-left.ledger", folder / "host.ledger"]
    monkeypatch.setattr(surveys, "ledger_paths", lambda _: paths)
    found = survey(folder)
    assert ([view.device for view in found.devices], found.problems) == (["host"], [])
    with open_ledgers(folder) as opened:
        assert [ledger.device for ledger, _ in opened.views] == ["host"]
        assert opened.problems == []


def test_a_folder_that_is_not_there_has_no_devices(tmp_path: Path) -> None:
    assert survey(tmp_path / "kv") == surveys.Survey([], [])
