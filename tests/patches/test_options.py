"""Options are read from an engine's sources and listed by release; what is new of them is told."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.planted import adapter_folder
from typer.testing import CliRunner

from kvcached_patches import ENGINES, options, registry
from kvcached_patches.__main__ import app
from kvcached_patches.locks import locked_releases, order, read_lock
from kvcached_patches.options import (
    Declarations,
    add_options,
    changed_options,
    options_in,
    read_options,
    write_options,
)
from kvcached_patches.registry import Release
from kvcached_patches.sglang_arguments import ARGUMENTS
from kvcached_patches.sources import Folder

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(ENGINES)
# What vLLM computes, and keeps beside the fields of a configuration.
NO_FIELDS = ("ModelConfig.runner_type",)
# Ours, which engines have beside their own.
OUR_FLAGS = ("enable_kvcached", "kvcached_")

FIRST = """
from engine.groups.memory import Memory
from engine.groups.model import Model as Renamed
from engine.other import Other

class Arguments:
    port: int = 0
    _seen: bool = False
    KINDS: ClassVar[tuple] = ()
    unannotated = 1

class Elsewhere:
    host: str
"""
GROUPS = {
    "memory": "class Memory:\n    size: A[int, Arg(help='bytes')] = 1\n    name: str\n",
    "model": "class Model:\n    name: str\n    def method(self):\n        local: int = 1\n",
    "unread": "class Unread:\n    gone: int\n",
}
GROUPED = Declarations("engine.arguments", "engine.groups.", "Arguments")
OWNED = Declarations("engine.arguments", "engine.groups.", has_owners=True)


@pytest.fixture
def sources(tmp_path: Path) -> Folder:
    groups = tmp_path / "engine" / "groups"
    groups.mkdir(parents=True)
    (tmp_path / "engine" / "arguments.py").write_text(FIRST)
    for name, text in GROUPS.items():
        (groups / f"{name}.py").write_text(text)
    return Folder(tmp_path)


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of lists, in the place of ours, with two releases of an engine."""
    monkeypatch.setattr(options, "FOLDER", tmp_path / "lists")
    write_options("engine", {"1.10.0": frozenset("bcd"), "1.9.0": frozenset("abc")})
    return tmp_path / "lists" / "engine.json"


def test_options_are_what_classes_annotate_in_the_modules_that_are_imported(
    sources: Folder,
) -> None:
    assert options_in(sources, GROUPED) == {"port", "size", "name"}
    assert options_in(sources, OWNED) == {"Memory.size", "Memory.name", "Model.name"}
    assert options_in(sources, Declarations("engine.gone", "engine.groups.")) == frozenset()


def test_a_list_says_what_came_and_what_went_with_each_release(listed: Path) -> None:
    assert json.loads(listed.read_text()) == {
        "1.9.0": {"new": ["a", "b", "c"], "gone": []},
        "1.10.0": {"new": ["d"], "gone": ["a"]},
    }
    before = read_options("engine")
    add_options("engine", "1.9.1+cpu", frozenset("abx"))
    assert read_options("engine") == before | {"1.9.1": frozenset("abx")}
    assert list(read_options("engine")) == ["1.9.0", "1.9.1", "1.10.0"]
    assert read_options("another") == {}


@pytest.mark.parametrize(
    ("release", "names", "lines"),
    [
        ("1.11.0", "bcd", []),
        (
            "1.11.0",
            "bcef",
            [
                "options that 1.10.0 does not have, to be read: e, f",
                "options that 1.10.0 has, gone or renamed: d",
            ],
        ),
        ("1.9.5", "abcd", ["options that 1.9.0 does not have, to be read: d"]),
        ("1.10.0", "abcd", ["options that 1.9.0 does not have, to be read: d"]),
        ("1.0.0", "z", []),
    ],
)
def test_what_a_release_has_more_or_less_than_the_one_before_is_told(
    listed: Path, release: str, names: str, lines: list[str]
) -> None:
    assert listed.is_file()
    assert list(changed_options("engine", release, frozenset(names))) == lines


def test_who_looks_for_new_engines_is_told_which_options_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = locked_releases("vllm")[-1]
    new = f"{order(newest).major}.{order(newest).minor + 1}.0"
    release = Release("vllm", new, "vllm.whl", "https://index/vllm.whl")
    config = tmp_path / "vllm" / "config"
    config.mkdir(parents=True)
    (config / "__init__.py").write_text("from vllm.config.cache import CacheConfig\n")
    (config / "cache.py").write_text("class CacheConfig:\n    kv_cache_on_the_moon: bool = False\n")
    found = {"vllm": {new: release}}
    monkeypatch.setattr(registry, "releases", lambda name: found.get(name, {}))
    monkeypatch.setattr(registry, "RemoteSources", lambda _: Folder(tmp_path))
    said = CliRunner().invoke(app, ["new-engines"])
    assert said.exit_code == 1
    told = f"vllm {new}: options that {newest} does not have, to be read: CacheConfig.kv_cache_on_"
    assert told in said.output
    gone = f"vllm {new}: options that {newest} has, gone or renamed: AttentionConfig."
    assert gone in said.output


@pytest.mark.parametrize("package", PACKAGES)
def test_each_release_with_a_lock_has_its_options_listed(package: str) -> None:
    locked = {release for one in ENGINES[package].oldest for release in locked_releases(one)}
    known = read_options(package)
    assert set(known) == locked, "run: python -m kvcached_patches relock"
    assert min(map(len, known.values())) > 350


def names_of(package: str) -> set[str]:
    """Return the names of all options of all listed releases, without their classes."""
    every = frozenset().union(*read_options(package).values())
    return {name.rpartition(".")[2] for name in every}


def flags_in(text: str) -> set[str]:
    """Return the options that a text names by their flags."""
    flags = re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", text)
    names = {flag.replace("-", "_") for flag in flags}
    return {name for name in names if not name.startswith(OUR_FLAGS)}


@pytest.mark.parametrize("package", PACKAGES)
def test_each_flag_that_an_adapter_names_is_an_option_of_some_release(package: str) -> None:
    text = "".join(file.read_text() for file in adapter_folder(package).rglob("*.py"))
    assert len(flags_in(text)) > 15
    assert flags_in(text) - names_of(package) == set()


def test_each_flag_in_the_list_of_refusals_is_an_option_of_some_release() -> None:
    refusals = (ROOT / "docs" / "support.md").read_text().split("## What is refused")[1]
    assert flags_in(refusals) - names_of("vllm") - names_of("sglang") == set()


def sglangs_arguments() -> Iterator[str]:
    yield from (hook.path[-1] for hook in ARGUMENTS if "ServerArgs" in "".join(hook.alternatives))


def vllms_settings() -> Iterator[str]:
    """Yield the fields of vLLM's configuration that our table has; methods are none."""
    symbols: dict[str, Any] = {}
    for release in locked_releases("vllm"):
        lock = read_lock("vllm", release)
        symbols |= lock.symbols if lock else {}
    for target, symbol in symbols.items():
        module, _, path = target.partition(":")
        is_field = module.startswith("vllm.config.") and symbol.signature == "a name"
        if is_field and "Config." in path and path not in NO_FIELDS:
            yield path


READ: dict[str, Callable[[], Iterator[str]]] = {
    "sglang": sglangs_arguments,
    "vllm": vllms_settings,
}


@pytest.mark.parametrize("package", PACKAGES)
def test_each_setting_that_an_adapter_reads_is_an_option_of_some_release(package: str) -> None:
    read = set(READ[package]())
    assert len(read) > 30
    every = frozenset().union(*read_options(package).values())
    assert read - every == set()
