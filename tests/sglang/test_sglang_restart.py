"""SGLang has its weights from an earlier start's copy, in memory or on disk, if that is whole."""

from pathlib import Path

import pytest
from helpers.other_weights import move_to_disk, put_other_weights, spoil_copy
from helpers.sglang_engine import Answers, answers
from helpers.sglang_weights import NUM_KV_PAGES, NUM_WEIGHTS, PAGE, start_yielding

from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.every_release]

BURST = Burst(((5, 6, 7, 8), (9,) * 40, tuple(range(11, 60))), 8)
NO_FILE = "are those of its host copy; no file was read"


def test_a_restart_reads_no_weights_and_answers_the_same_unless_its_copy_is_spoiled(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "llama", seed=1)
    with Servers(tmp_path, (NUM_WEIGHTS + NUM_KV_PAGES + 3) * PAGE) as servers:

        def run(name: str) -> tuple[Answers, str]:
            server = start_yielding(servers, name, model)
            found = answers(server, [BURST])
            server.stop()
            return found, server.log.read_text()

        expected, said = run("first")
        assert NO_FILE not in said
        put_other_weights(model, make_model(tmp_path / "other", seed=2))
        found, said = run("second")
        assert found == expected
        assert NO_FILE in said
        environ = {
            "KVCACHED_WEIGHTS_DIR": str(servers.workspace / "weights"),
            "KVCACHED_WEIGHTS_DISK": str(servers.workspace / "disk"),
            "KVCACHED_WEIGHTS_DISK_FREE": "0",
        }
        move_to_disk(environ)
        found, said = run("third")
        assert found == expected
        assert NO_FILE in said
        assert "came back from the disk" in said
        move_to_disk(environ)
        spoil_copy(servers.workspace / "disk")
        found, said = run("fourth")
        assert found != expected  # what the files hold now
        assert NO_FILE not in said
        assert "pages are not those that its record is of" in said
