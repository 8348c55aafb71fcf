"""The local cache of a hub, as it is found without the hub's own library."""

import sys
from pathlib import Path

import pytest

from kvcached_core.memory.hub_cache import cached_folder
from kvcached_core.memory.model_bytes import find_folder

COMMIT = "0123456789abcdef"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one model, of which a commit is the main branch."""
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_branch_and_a_commit_are_found_and_nothing_else(cache: Path) -> None:
    snapshot = cache / "models--some--model" / "snapshots" / COMMIT
    assert cached_folder("some/model", cache_dir=str(cache)) == snapshot
    assert cached_folder("some/model", COMMIT, str(cache)) == snapshot
    assert cached_folder("some/model", "other", str(cache)) is None
    assert cached_folder("some/other", cache_dir=str(cache)) is None
    assert cached_folder("no name of a hub at all", cache_dir=str(cache)) is None
    assert cached_folder("../some/model", cache_dir=str(cache)) is None


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_variables_of_the_hub_say_where_the_cache_is(
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    below: str,
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    top = tmp_path_factory.mktemp("top")
    (top / below).parent.mkdir(parents=True, exist_ok=True)
    if below:
        (top / below).symlink_to(cache)
    monkeypatch.setenv(variable, str(top if below else cache))
    assert cached_folder("some/model") is not None


def test_a_gateway_without_the_hubs_library_finds_it_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = find_folder("some/model", cache_dir=str(cache))
    assert found == cache / "models--some--model" / "snapshots" / COMMIT
