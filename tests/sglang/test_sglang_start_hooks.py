"""How a start of SGLang ends where we cannot serve: decided early, and said once."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from kvcached_core.errors import LedgerError, UnsupportedEngineError
from kvcached_sglang import engine as engines
from kvcached_sglang import start_hooks, startup
from kvcached_sglang.ranks import FirstRankError

pytestmark = pytest.mark.sglang


class Scheduler:
    """One whose start ends with an error."""

    def __init__(self, error: BaseException) -> None:
        raise error


def end_of(error: BaseException) -> Any:
    wrapped = start_hooks.scheduler_init(Scheduler.__init__)
    with pytest.raises(type(error) if type(error) is RuntimeError else SystemExit) as caught:
        wrapped(SimpleNamespace(), error)
    return getattr(caught.value, "code", None)


@pytest.mark.parametrize("error", [LedgerError("no folder"), SystemExit("kvcached: no folder")])
def test_what_of_ours_ends_a_start_is_one_line(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(error) == startup.SAID
    assert capsys.readouterr().err == "kvcached: no folder\n"


@pytest.mark.parametrize("error", [FirstRankError("rank 0 said it"), SystemExit(startup.SAID)])
def test_what_the_first_rank_says_no_other_one_says(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(error) == startup.SAID
    assert capsys.readouterr().err == ""


def test_errors_of_sglangs_own_stay_what_they_are() -> None:
    assert end_of(RuntimeError("its own")) is None


@pytest.mark.parametrize(
    ("exit_codes", "end"), [([None, startup.SAID], SystemExit), ([1, None], RuntimeError)]
)
def test_the_launching_process_adds_nothing_to_what_was_said(
    exit_codes: list[int | None], end: type[BaseException]
) -> None:
    def died(*_: Any) -> None:
        raise RuntimeError("a scheduler died")

    processes = [SimpleNamespace(exitcode=code) for code in exit_codes]
    with pytest.raises(end) as caught:
        start_hooks.wait_for_scheduler_ready(died)([], processes)
    assert getattr(caught.value, "code", 1) == 1


def load(runner: Any, switch: str, problem: UnsupportedEngineError | None) -> list[str]:
    """Load a model; return what happened, in order."""
    happened: list[str] = []

    def check(_: Any) -> None:
        happened.append("checked")
        if problem is not None:
            raise problem

    with (
        patch.object(startup, "_patcher", object()),
        patch.object(startup, "check_model", check),
        patch.object(start_hooks, "start_engine", lambda _: happened.append("started")),
        patch.object(engines, "_engine", None),
        patch.dict("os.environ", {"ENABLE_KVCACHED": switch}),
    ):
        start_hooks.load_model(lambda _: happened.append("loaded"))(runner)
        profile: Any = start_hooks.profile_available_bytes(lambda _: 3)
        happened.append(f"sized {profile(runner)}")
    return happened


def test_a_model_is_checked_and_the_ledger_entered_before_its_weights_are_loaded() -> None:
    happened = load(SimpleNamespace(), "1", None)
    assert happened[:3] == ["checked", "started", "loaded"]


def test_a_model_that_cannot_be_served_ends_the_start_with_nothing_loaded() -> None:
    with pytest.raises(SystemExit, match="kvcached: a reason"):
        load(SimpleNamespace(), "1", UnsupportedEngineError("a reason"))


def test_under_auto_it_is_loaded_and_sized_as_sglang_does_it() -> None:
    happened = load(SimpleNamespace(), "auto", UnsupportedEngineError("a reason"))
    assert happened == ["checked", "loaded", "sized 3"]
