"""What the documents say of the gateway's files is what the code reads."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.documents import ROOT, blocks
from helpers.gateway_tables import DOCUMENT, SECTION, TABLES, rows, tables, written

from kvcached_core.cli.app import app
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.settings.config_file import DEFAULT_KEYS, read_settings
from kvcached_gateway.settings.keys import Keys
from kvcached_gateway.settings.owned import OWNED_VARIABLES

CONFIGURATION = DOCUMENT.read_text().split(SECTION)[1]
GATEWAY = ROOT / "docs" / "gateway.md"
COMMANDS = (ROOT / "pyproject.toml").read_text()


def files(word: str) -> list[str]:
    """Return each file that the page shows and that has a line beginning with a word."""
    found = ["\n".join(block) for block in blocks(GATEWAY)]
    return [text for text in found if re.search(rf"^{word}", text, re.MULTILINE)]


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    names = re.findall(r"(?:\$\{|key_env: )(\w+)", text)
    return read_settings(path, dict.fromkeys(names, "x"))


def test_every_table_is_the_codes() -> None:
    found = tables(DOCUMENT.read_text())
    assert [table.splitlines() for table in found] == [rows(title) for title in TABLES]


def test_tables_are_written_where_they_are() -> None:
    broken = DOCUMENT.read_text().replace("| `max_queue` |", "| `queue` |")
    assert written(broken) == DOCUMENT.read_text()


def test_the_keys_of_defaults_are_listed() -> None:
    (block,) = [block for block in blocks(DOCUMENT) if "environment" in block[0]]
    assert set(" ".join(block).split()) == DEFAULT_KEYS


def test_the_variables_that_are_refused_are_listed() -> None:
    last = CONFIGURATION.strip().split("\n\n")[-1]
    assert set(re.findall(r"`([A-Z_]+)`", last)) == set(OWNED_VARIABLES)


def test_the_files_of_models_that_are_shown_can_be_read(tmp_path: Path) -> None:
    shown = files("models:")
    assert shown
    for text in shown:
        assert read(tmp_path, text).models


def test_the_keys_file_that_is_shown_can_be_read(tmp_path: Path) -> None:
    (text,) = [text for text in files("alice:") if "sha256" in text]
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    path.chmod(0o600)
    assert [key.name for key in Keys.read(path).all] == list(yaml.safe_load(text))


@pytest.mark.parametrize("document", [GATEWAY, DOCUMENT])
def test_every_command_that_is_named_is_one(document: Path) -> None:
    core = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    named = set(re.findall(r"(?:`|^    )kvcached ([a-z]+)\b", document.read_text(), re.MULTILINE))
    added = set(re.findall(r'^(\w+) = "kvcached_gateway.commands:', COMMANDS, re.MULTILINE))
    assert named <= core | added
    if document == GATEWAY:
        assert added <= named


def test_the_commands_that_make_a_key_make_it_and_its_hash() -> None:
    (block,) = [block for block in blocks(GATEWAY) if block[0].startswith("key=")]
    script = "\n".join([*block, 'echo "$key"'])
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True)
    digest, key = done.stdout.replace("-", "").split()
    assert hashlib.sha256(key.encode()).hexdigest() == digest
