"""The file of models of a cluster: read again on the head node, and taken whole or not at all."""

from pathlib import Path

import pytest

from kvcached_core.errors import ConfigError
from kvcached_ray.models_file import ModelsFile


def test_a_file_of_the_head_node_counts_more_than_what_was_deployed(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    assert ModelsFile(path, "deployed").text == "deployed"
    path.write_text("here")
    assert ModelsFile(path, "deployed").text == "here"


def test_a_new_text_holds_once_it_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("one")
    file = ModelsFile(path, "one")
    path.write_text("two")
    file.read()
    assert (file.text, file.new) == ("one", "two")
    file.settle(is_taken=False)
    assert (file.text, file.new) == ("one", "one")
    file.read()
    file.settle(is_taken=True)
    assert (file.text, file.new) == ("two", "two")


def test_a_file_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    file = ModelsFile(tmp_path / "models.yaml", "one")
    with pytest.raises(ConfigError, match="cannot be read"):
        file.read()
    assert (file.text, file.new) == ("one", "one")
