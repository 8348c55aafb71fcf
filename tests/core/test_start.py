"""Starting an engine: hooked, served unpatched with one warning, or ended with one message."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.engine.start import SAID, Startup, check, model_name
from kvcached_core.errors import (
    ConfigError,
    GeometryError,
    KVCachedError,
    LedgerError,
    UnsupportedEngineError,
)

ERROR = UnsupportedEngineError("because")


class FakePatches:
    """An engine's hooks, which may be absent, not fit, or turn out later not to fit."""

    title = "Engine"

    def __init__(self, release: str | None = "1.0", misfit: str = "") -> None:
        self.found = SimpleNamespace(release=release) if release else None
        self.reason = misfit
        self.num_checks = 0
        self.on_misfit: Any = None

    def installed(self) -> Any:
        return self.found

    def misfit(self, found: Any) -> str:
        self.num_checks += 1
        return self.reason if found is not None else "no Engine is installed"

    def apply(self, found: Any, on_misfit: Callable[[Exception], None]) -> Any:
        assert found is self.found
        self.on_misfit = on_misfit
        return self


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "kv"))
    monkeypatch.setenv("_KVCACHED_ENGINE_CHECKED", "")
    monkeypatch.setenv("ENABLE_KVCACHED", "1")


def test_off_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "0")
    patches = FakePatches()
    startup = Startup(patches)
    startup.start()
    assert (startup.is_on, patches.num_checks) == (False, 0)


def test_a_process_is_hooked_once_and_the_processes_it_starts_check_nothing_again() -> None:
    patches, child = FakePatches(), FakePatches()
    startup = Startup(patches)
    startup.start()
    startup.start()
    Startup(child).start()
    assert (startup.is_on, patches.num_checks, child.num_checks) == (True, 1, 0)
    assert startup.engine == "engine 1.0"


def test_another_release_in_a_started_process_is_checked() -> None:
    Startup(FakePatches()).start()
    other = FakePatches("2.0")
    Startup(other).start()
    assert other.num_checks == 1


@pytest.mark.parametrize("patches", [FakePatches(None), FakePatches(misfit="it is not there")])
def test_a_release_that_does_not_fit_is_not_hooked(
    monkeypatch: pytest.MonkeyPatch, patches: FakePatches
) -> None:
    with pytest.raises(SystemExit, match=r"kvcached: (no Engine is|it is not there)"):
        Startup(patches).start()
    monkeypatch.setenv("ENABLE_KVCACHED", "auto")
    startup = Startup(patches)
    startup.start()
    assert not startup.is_on
    assert patches.on_misfit is None


def test_a_hook_that_does_not_fit_later_is_refused_as_a_release_is() -> None:
    patches = FakePatches()
    Startup(patches).start()
    with pytest.raises(SystemExit, match="kvcached: it was wrapped"):
        patches.on_misfit(ValueError("it was wrapped"))


def test_a_bad_setting_ends_the_start_under_auto_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "auto")
    monkeypatch.setenv("KVCACHED_LIMIT", "much")
    with pytest.raises(SystemExit, match="kvcached: KVCACHED_LIMIT='much'"):
        Startup(FakePatches()).start()


def test_auto_goes_on_unpatched_with_one_warning_and_so_do_the_children(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "auto")
    startup = Startup(FakePatches())
    startup.start()
    assert startup.serves([])
    assert not startup.serves(["because"])
    assert os.environ["ENABLE_KVCACHED"] == "0"
    assert not startup.is_on
    (message,) = caplog.messages
    first, second, _ = message.splitlines()
    assert first.startswith("kvcached is off, Engine serves unpatched: this configuration cannot ")
    assert second == "  - because"
    assert caplog.records[0].name == "engine.kvcached"  # an engine shows only its own


def test_other_ranks_are_silent_about_what_the_first_one_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = Startup(FakePatches(), is_first_rank=lambda: False)
    with pytest.raises(SystemExit) as caught:
        other.refuse(ERROR)
    assert caught.value.code == SAID
    monkeypatch.setenv("ENABLE_KVCACHED", "auto")
    other.refuse(ERROR)
    assert os.environ["ENABLE_KVCACHED"] == "0"
    assert caplog.messages == []


def test_a_configuration_is_refused_with_every_obstacle_once() -> None:
    check([])
    with pytest.raises(UnsupportedEngineError, match=r"(?s)\n  - one\n  - two\n.*auto or 0"):
        check(iter(["one", "two", "one"]))


@pytest.mark.parametrize("switch", ["1", "auto"])
@pytest.mark.parametrize("kind", [GeometryError, UnsupportedEngineError])
def test_what_shows_after_the_sizes_were_chosen_ends_the_start_under_auto_too(
    monkeypatch: pytest.MonkeyPatch, switch: str, kind: type[KVCachedError]
) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", switch)
    with (
        pytest.raises(SystemExit, match=r"(?s)kvcached: because\n.*set ENABLE_KVCACHED=0"),
        Startup(FakePatches()).one_message(),
    ):
        raise kind("because")
    assert os.environ["ENABLE_KVCACHED"] == switch


@pytest.mark.parametrize("kind", [ConfigError, LedgerError])
def test_a_start_that_fails_otherwise_ends_with_one_line(kind: type[KVCachedError]) -> None:
    startup = Startup(FakePatches())
    with pytest.raises(SystemExit, match=r"^kvcached: because$"), startup.one_message():
        raise kind("because")
    with pytest.raises(ZeroDivisionError), startup.one_message():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("kind", "code"), [(ConfigError, SAID), (GeometryError, SAID), (LedgerError, "kvcached: why")]
)
def test_only_what_is_one_ranks_own_is_said_by_that_rank(
    kind: type[KVCachedError], code: object
) -> None:
    other = Startup(FakePatches(), is_first_rank=lambda: False)
    with pytest.raises(SystemExit) as caught, other.one_message():
        raise kind("why")
    assert caught.value.code == code


def test_an_instance_is_called_by_the_last_part_of_its_models_name() -> None:
    assert model_name("meta-llama/Llama-3.1-8B") == "Llama-3.1-8B"
    assert model_name(Path("/models/a b")) == model_name("a b")
