"""A real SGLang server computes on its first layers while its last ones are still on their way."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.lazy_plugin import DEFECT, REPORT, add_plugin
from helpers.sglang_engine import Vanilla, answers
from helpers.sglang_weights import NUM_KV_PAGES, NUM_WEIGHTS, PAGE, start_yielding
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core import control
from kvcached_core.control import Outcome
from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.every_release,
]

NAME = "arriving"
BURST = Burst(((5, 6, 7, 8), (9,) * 40, tuple(range(11, 60))), 8)
NUM_LAYERS = 4


class Arriving:
    """A server whose copies are never done before somebody waits for them.

    Args:
        servers: It and its neighbours.
        server: The server.
        variables: Where it reports, and is told what to do.
    """

    def __init__(self, servers: Servers, server: EngineServer, variables: dict[str, str]) -> None:
        self.server = server
        self.report, self.defect = Path(variables[REPORT]), Path(variables[DEFECT])
        self._directory = servers.directory

    def sleep(self) -> None:
        """Take all of its weights, as soon as it has done with its requests."""

        def is_asleep() -> bool:
            slept = control.sleep(NAME, directory=self._directory, wait_seconds=PATIENCE_SECONDS)
            return slept.outcome is Outcome.APPLIED

        await_that(is_asleep)

    def begun(self) -> list[list[int]]:
        """Return each layer that began since it was asked last, and the copies open then."""
        lines = self.report.read_text().splitlines() if self.report.exists() else []
        self.report.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def arriving(tmp_path: Path, model: Path) -> Iterator[Arriving]:
    variables = add_plugin(tmp_path / "plugin")
    with Servers(tmp_path, (NUM_WEIGHTS + NUM_KV_PAGES + 3) * PAGE) as servers:
        settings = {"KVCACHED_WEIGHTS_WAIT": "layers", **variables}
        server = start_yielding(servers, NAME, model, **settings)
        yield Arriving(servers, server, variables)
        assert server.process.poll() is None


def test_a_prompt_begins_while_weights_come_and_its_answer_is_vanillas(
    arriving: Arriving, model: Path, vanilla: Vanilla
) -> None:
    expected = vanilla(model, (BURST,))
    assert answers(arriving.server, [BURST]) == expected
    first = arriving.begun()[:NUM_LAYERS]  # one forward is watched, while all is there
    assert first == [[layer, 0] for layer in range(NUM_LAYERS)]

    for _ in range(2):
        arriving.sleep()
        assert answers(arriving.server, [BURST]) == expected
        begun = arriving.begun()
        # Only the first batch looks: when it was launched, all was there or waited for.
        assert [layer for layer, _ in begun] == list(range(NUM_LAYERS))
        num_open = [number for _, number in begun]
        assert num_open == sorted(num_open, reverse=True)
        assert len(set(num_open)) == NUM_LAYERS
        assert num_open[-1] == 0

    arriving.sleep()
    arriving.defect.touch()
    assert answers(arriving.server, [BURST]) != expected
    arriving.defect.unlink()
    arriving.sleep()
    assert answers(arriving.server, [BURST]) == expected
