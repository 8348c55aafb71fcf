"""Which files an engine has: no two engines of one gateway have the same."""

from dataclasses import dataclass
from pathlib import Path

from kvcached_gateway.engines.runner import Runner
from kvcached_gateway.engines.state_file import Folder


@dataclass
class Files:
    """What the runner asks of an engine before it names the files of another."""

    is_gone: bool = False


def test_a_log_is_one_engines_until_that_one_is_gone(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder:
        runner = Runner(folder, tmp_path, dict, {}, tmp_path)
        names = []
        for _ in range(3):
            names.append(runner._free_stem("a"))
            runner._engines[names[-1]] = Files()  # type: ignore[assignment]
        assert names == ["a", "a.2", "a.3"]
        assert runner._free_stem("b") == "b"
        runner._engines["a.2"].is_gone = True
        assert runner._free_stem("a") == "a.2"
