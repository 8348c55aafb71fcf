"""What the documents say of messages, refusals and defaults is what the code says."""

import ast
import functools
import re
from pathlib import Path

import pytest

from kvcached_core.config import PREFIX, Config, read_config, read_switch

ROOT = Path(__file__).parents[2]
MESSAGES = (ROOT / "docs" / "operations.md").read_text().split("## Messages at the start")[1]
SETTINGS = (ROOT / "docs" / "configuration.md").read_text()
SUPPORT = (ROOT / "docs" / "support.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("kvcached_core", "integrations", "patches")
LINE_LENGTH = 120
UNKNOWN = "…"  # what stands in a message for something that differs


def documented_messages() -> list[str]:
    rows = [line.split("|")[1] for line in MESSAGES.splitlines() if line.startswith("| `")]
    found = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    return [message for message in found if " " in message]  # the others are names


@functools.cache
def said(folder: Path) -> list[str]:
    """Return every text in a folder's code, with a sign in the place of what is put into it."""
    found = []
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else UNKNOWN
                    for part in node.values
                ]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_documented() -> None:
    assert len(documented_messages()) > 10


@pytest.mark.parametrize("message", documented_messages())
def test_a_documented_message_is_one_that_the_code_says(message: str) -> None:
    for clause in message.split(";"):  # two texts may make a message
        parts = [re.escape(part.strip()) for part in clause.split(UNKNOWN)]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for name in PACKAGES for text in said(ROOT / name))


def documented_defaults() -> dict[str, str]:
    rows = [line.split("|") for line in SETTINGS.splitlines() if line.startswith("| `")]
    return {row[1].strip().strip("`"): row[2].strip() for row in rows}


@pytest.mark.parametrize(
    "field", ["host_pool", "limit", "floor", "priority", "headroom", "page_bytes"]
)
def test_a_documented_default_is_the_codes(field: str) -> None:
    variable = f"{PREFIX}{field.upper()}"
    told = documented_defaults()[variable].strip("`")
    assert getattr(Config(), field) == getattr(read_config({variable: told}), field)


def test_documented_times_and_switches_are_the_codes() -> None:
    told = documented_defaults()
    assert told[f"{PREFIX}IDLE_SECONDS"] == f"`{Config().idle_seconds:g}`"
    assert told[f"{PREFIX}DEBUG"] == f"`{Config().debug:d}`"
    assert told["ENABLE_KVCACHED"] == f"`{read_switch({})}`"
    adr = (ROOT / "docs" / "adr" / "0004-idle-pages-linger.md").read_text()
    assert f"`{PREFIX}IDLE_SECONDS` ({Config().idle_seconds:g})" in adr


def refused_flags() -> set[str]:
    """Return every flag that a refusal tells to set or to remove."""
    adapters = [ROOT / "integrations" / name for name in ("vllm", "sglang")]
    texts = [text for adapter in adapters for text in said(adapter)]
    return {flag for text in texts for flag in re.findall(r"(?:set|remove) (--[a-z][a-z-]+)", text)}


def test_every_setting_that_a_refusal_names_is_in_the_list_of_refusals() -> None:
    assert len(refused_flags()) > 15
    refusals = SUPPORT.split("## What is refused")[1]
    assert {flag for flag in refused_flags() if flag not in refusals} == set()


def anchors(document: Path) -> set[str]:
    """Return what a link may name of a document: its headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_of_prose_is_long(document: Path) -> None:
    lines = [line for line in document.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > LINE_LENGTH] == []


def test_the_design_names_every_module_of_the_core_and_no_other() -> None:
    parts = (ROOT / "docs" / "design.md").read_text().split("## Parts")[1].split("integrations/")[0]
    core = ROOT / "kvcached_core"
    modules = {file.name for file in core.rglob("*.py") if not {"vmm", "cli"} & set(file.parts)}
    assert set(re.findall(r"\w+\.py", parts)) == modules - {"__init__.py"}
