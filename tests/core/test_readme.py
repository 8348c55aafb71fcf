"""The README says on its first page what a stranger needs, and stays short."""

import tomllib
from pathlib import Path

from kvcached_core import __version__
from kvcached_patches.engines import ENGINES
from kvcached_patches.locks import locked_releases, order

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "README.md").read_text().splitlines()
FIRST_PAGE = "\n".join(LINES[:80])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_readme_is_short() -> None:
    assert len(LINES) < 200


def test_the_first_page_names_what_is_required() -> None:
    (requirements,) = (
        paragraph for paragraph in FIRST_PAGE.split("\n\n") if "**Requirements:**" in paragraph
    )
    for word in ("Linux", f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer"):
        assert word in requirements
    for title, engine in (("vLLM", ENGINES["vllm"]), ("SGLang", ENGINES["sglang"])):
        locked = {release for name in engine.oldest for release in locked_releases(name)}
        oldest, newest = min(locked, key=order), max(locked, key=order)
        assert f"{title} {oldest.removesuffix('.0')} to {newest.removesuffix('.0')}" in requirements


def test_the_first_page_says_the_version_that_this_is() -> None:
    assert f"({__version__})" in FIRST_PAGE
    assert PROJECT["version"] == __version__


def test_the_first_page_switches_each_engine_on_and_off_and_uninstalls() -> None:
    for command in (
        "    ENABLE_KVCACHED=1 vllm serve MODEL",
        "    python -m sglang.launch_server --model-path MODEL --enable-kvcached",
        f"    pip uninstall {PROJECT['name']}",
    ):
        assert command in LINES[:80]
    (off,) = (part for part in FIRST_PAGE.split("\n\n") if part.startswith("**Off.**"))
    for word in ("vLLM", "`ENABLE_KVCACHED=0`", "SGLang", "without `--enable-kvcached`"):
        assert word in " ".join(off.split())


def test_the_first_page_says_where_the_refusals_are() -> None:
    assert "docs/support.md#what-is-refused" in FIRST_PAGE
    assert "docs/operations.md#messages-at-the-start" in FIRST_PAGE
