"""How a start of SGLang ends where we cannot serve: decided early, and said once."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from kvcached_core.engine.start import SAID
from kvcached_core.engine.starting import Start
from kvcached_core.errors import FirstRankError, LedgerError
from kvcached_core.memory.model_bytes import OTHER_BYTES
from kvcached_sglang import engine as engines
from kvcached_sglang import obstacles, start_hooks
from kvcached_sglang.startup import startup
from kvcached_sglang.weights import weight_bytes

pytestmark = pytest.mark.sglang

RUNNER = SimpleNamespace(server_args=None)
REST = f"announced {OTHER_BYTES}"


class Scheduler:
    """One whose start ends with an error."""

    def __init__(self, _server_args: Any, error: BaseException) -> None:
        raise error


def end_of(error: BaseException, *, num_replicas: int = 1) -> Any:
    wrapped = start_hooks.scheduler_init(Scheduler.__init__)
    with pytest.raises(type(error) if type(error) is RuntimeError else SystemExit) as caught:
        wrapped(SimpleNamespace(), SimpleNamespace(dp_size=num_replicas), error)
    return getattr(caught.value, "code", None)


@pytest.mark.parametrize("error", [LedgerError("no folder"), SystemExit("kvcached: no folder")])
def test_what_of_ours_ends_a_start_is_one_line(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(error) == SAID
    assert capsys.readouterr().err == "kvcached: no folder\n"


@pytest.mark.parametrize("error", [FirstRankError("rank 0 said it"), SystemExit(SAID)])
def test_what_the_first_rank_says_no_other_one_says(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(error) == SAID
    assert capsys.readouterr().err == ""


def test_errors_of_sglangs_own_stay_what_they_are() -> None:
    assert end_of(RuntimeError("its own")) is None


def test_a_data_parallel_rank_ends_who_would_wait_for_it_and_only_for_what_is_ours() -> None:
    with patch.object(start_hooks.os, "kill") as kill:
        end_of(RuntimeError("its own"), num_replicas=2)
        end_of(LedgerError("no folder"))
        kill.assert_not_called()
        assert end_of(LedgerError("no folder"), num_replicas=2) == SAID
    kill.assert_called_once_with(os.getppid(), signal.SIGTERM)


@pytest.mark.parametrize("copies", [None, Mock()], ids=["alone", "with HiCache"])
def test_an_engine_that_is_ready_gives_its_weights_layer_by_layer_and_says_what_is_elastic(
    caplog: pytest.LogCaptureFixture, copies: Mock | None
) -> None:
    controller = object()
    ours = SimpleNamespace(copies=copies)
    runner = SimpleNamespace(model_config=SimpleNamespace(is_generation=False, is_multimodal=False))
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner),
        tree_cache=SimpleNamespace(cache_controller=controller),
    )
    with (
        patch.object(engines, "_engine", ours),
        patch.object(start_hooks, "begin_to_yield") as yields,
        patch.object(start_hooks, "let_layers_wait") as waits,
        caplog.at_level("INFO"),
    ):
        start_hooks.scheduler_init(lambda *_: None)(scheduler, SimpleNamespace(dp_size=1))
    yields.assert_called_once_with(ours, runner)
    waits.assert_called_once_with(ours, runner)
    if copies is not None:
        copies.meet.assert_called_once_with(controller)
    assert "keys and values are elastic" in caplog.text


@pytest.mark.parametrize(
    ("exit_codes", "end"),
    [
        ([None, SAID], SystemExit),
        ([-signal.SIGTERM], SystemExit),
        ([1, None], RuntimeError),
        ([-signal.SIGQUIT], RuntimeError),
    ],
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


def load(runner: Any, switch: str, problems: list[str]) -> list[str]:
    """Load a model that has obstacles; return what happened, in order."""
    happened: list[str] = []

    def model_obstacles(_: Any) -> Iterator[str]:
        happened.append("checked")
        yield from problems

    with (
        patch.object(startup, "applied", object()),
        patch.object(obstacles, "argument_obstacles", lambda _: ()),
        patch.object(obstacles, "model_obstacles", model_obstacles),
        patch.object(start_hooks, "start_engine", lambda _: happened.append("started")),
        patch.object(engines, "_engine", None),
        patch.dict("os.environ", {"ENABLE_KVCACHED": switch}),
    ):
        start_hooks.load_model(lambda _: happened.append("loaded"))(runner)
        profile: Any = start_hooks.profile_available_bytes(lambda _: 3)
        happened.append(f"sized {profile(runner)}")
    return happened


def test_a_model_is_checked_and_the_ledger_entered_before_its_weights_are_loaded() -> None:
    happened = load(RUNNER, "1", [])
    assert happened[:3] == ["checked", "started", "loaded"]


def test_a_model_that_cannot_be_served_ends_the_start_with_nothing_loaded() -> None:
    with pytest.raises(SystemExit, match=r"(?s)kvcached: .*a reason"):
        load(RUNNER, "1", ["a reason"])


def test_under_auto_it_is_loaded_and_sized_as_sglang_does_it() -> None:
    happened = load(RUNNER, "auto", ["a reason"])
    assert happened == ["checked", "loaded", "sized 3"]


@pytest.mark.parametrize(
    ("kind", "yields", "expected"),
    [
        ("cuda", False, [f"room for {5 + OTHER_BYTES}", "loaded", REST, "weights hold 12"]),
        ("cuda", True, [f"room for {5 + OTHER_BYTES}", "loaded", REST]),
        ("host", True, ["room for 5", "loaded"]),
        ("host", False, ["loaded"]),
    ],
)
def test_neighbours_make_room_first_for_weights_that_count(
    kind: str,
    yields: bool,  # noqa: FBT001
    expected: list[str],
) -> None:
    happened: list[str] = []
    starts: list[Start] = []

    def make_room_for(size: int, start: Start) -> None:
        happened.append(f"room for {size}")
        starts.append(start)

    engine = SimpleNamespace(
        device=SimpleNamespace(kind=kind),
        may_yield=yields,
        config=SimpleNamespace(page_bytes=7),
        make_room_for=make_room_for,
        ranks=SimpleNamespace(announce=lambda size: happened.append(f"announced {size}")),
        saved=SimpleNamespace(at_least=lambda tag, size: happened.append(f"{tag} hold {size}")),
    )
    runner = SimpleNamespace(
        model=torch.nn.Linear(2, 1), server_args=SimpleNamespace(enable_memory_saver=True)
    )
    with (
        patch.object(engines, "_engine", engine),
        patch.object(start_hooks, "weight_bytes", lambda _: 5),
        patch.object(start_hooks, "restart_of", lambda ours, _: "ours" if ours.may_yield else None),
    ):
        start_hooks.load_model(lambda _: happened.append("loaded"))(runner)
    assert getattr(engine, "restart", None) == ("ours" if yields else None)
    assert happened == expected
    assert starts == [Start(7, yields)] * (expected[0] != "loaded")


@pytest.mark.parametrize("is_draft", [False, True])
def test_a_draft_model_is_known_before_the_targets_pool_is_made(*, is_draft: bool) -> None:
    happened: list[str] = []
    engine = SimpleNamespace(
        device=SimpleNamespace(kind="host"),
        may_yield=False,
        drafts=SimpleNamespace(add=lambda _: happened.append("a draft")),
    )
    with patch.object(engines, "_engine", engine):
        runner = SimpleNamespace(is_draft_worker=is_draft)
        start_hooks.load_model(lambda _: happened.append("loaded"))(runner)
    assert happened == ["a draft"] * is_draft + ["loaded"]


def test_the_room_that_is_asked_for_is_a_ranks_share_of_the_model() -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "num_attention_heads": 4}

    def bytes_with(num_ranks: int) -> int:
        model = SimpleNamespace(model_path="no/such", hf_config=shape, dtype=torch.bfloat16)
        arguments = SimpleNamespace(tp_size=num_ranks)
        return weight_bytes(SimpleNamespace(server_args=arguments, model_config=model))

    whole = bytes_with(1)
    assert whole > 2 * 512 * 64 * 2
    assert bytes_with(2) == whole // 2
