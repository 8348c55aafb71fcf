"""Where an engine cannot be served elastically: the end with every reason, or a warning."""

import logging
import os

import pytest

from kvcached_core.engine.refusal import check_configuration, one_message, refuse
from kvcached_core.errors import (
    ConfigError,
    GeometryError,
    KVCachedError,
    LedgerError,
    UnsupportedEngineError,
)

LOGGER = logging.getLogger("kvcached.test")
ERROR = UnsupportedEngineError("because")


def test_auto_goes_on_unpatched_with_one_warning_and_so_do_the_children(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "auto")
    refuse(ERROR, engine="vLLM", logger=LOGGER)
    assert os.environ["ENABLE_KVCACHED"] == "0"
    assert caplog.messages == ["kvcached is off, vLLM serves unpatched: because"]


def test_switched_on_the_process_ends_with_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "1")
    with pytest.raises(SystemExit, match="kvcached: because"):
        refuse(ERROR, engine="vLLM", logger=LOGGER)


def test_a_configuration_is_refused_with_every_reason() -> None:
    check_configuration([])
    with pytest.raises(UnsupportedEngineError, match=r"(?s)\n  - one\n  - two\n.*auto or 0"):
        check_configuration(iter(["one", "two"]))


@pytest.mark.parametrize("switch", ["1", "auto"])
@pytest.mark.parametrize("kind", [GeometryError, UnsupportedEngineError])
def test_what_shows_after_the_sizes_were_chosen_ends_the_start_under_auto_too(
    monkeypatch: pytest.MonkeyPatch, switch: str, kind: type[KVCachedError]
) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", switch)
    with (
        pytest.raises(SystemExit, match=r"(?s)kvcached: because\n.*set ENABLE_KVCACHED=0"),
        one_message("vLLM"),
    ):
        raise kind("because")
    assert os.environ["ENABLE_KVCACHED"] == switch


@pytest.mark.parametrize("kind", [ConfigError, LedgerError])
def test_a_start_that_fails_otherwise_ends_with_one_line(kind: type[KVCachedError]) -> None:
    with pytest.raises(SystemExit, match=r"^kvcached: because$"), one_message("vLLM"):
        raise kind("because")
    with pytest.raises(ZeroDivisionError), one_message("vLLM"):
        raise ZeroDivisionError
