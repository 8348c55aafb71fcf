"""A real SGLang server answers as vanilla does, whatever became of its weights meanwhile."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.house import Neighbour
from helpers.sglang_engine import Answers, Vanilla, answers, post
from helpers.sglang_weights import NUM_KV_PAGES, NUM_WEIGHTS, PAGE, num_weights, start_yielding
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core import control
from kvcached_core.config import read_config
from kvcached_core.control import Outcome
from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

NAME = "yielding"
BURST = Burst(((5, 6, 7, 8), (9,) * 40, tuple(range(11, 60))), 8)
NUM_PAGES = NUM_WEIGHTS + NUM_KV_PAGES + 3  # so many has the device


@dataclass
class Served:
    """A server whose weights yield, and what vanilla answers."""

    servers: Servers
    server: EngineServer
    model: Path
    expected: Answers

    def check(self) -> None:
        assert answers(self.server, [BURST]) == self.expected

    def sleep(self) -> None:
        """Take all of its weights, as soon as it has done with its requests."""

        def is_asleep() -> bool:
            slept = control.sleep(
                NAME, directory=self.servers.directory, wait_seconds=PATIENCE_SECONDS
            )
            return slept.outcome is Outcome.APPLIED

        await_that(is_asleep)
        assert self.num_weights == 0

    @property
    def num_weights(self) -> int:
        return num_weights(self.servers, NAME)

    def ask(self, call: str, **words: Any) -> Any:
        answer = httpx.post(f"{self.server.url}/{call}", json=words, timeout=PATIENCE_SECONDS)
        answer.raise_for_status()
        return answer

    def load(self, model: Path) -> None:
        """Let the server read other weights."""
        assert self.ask("update_weights_from_disk", model_path=str(model)).json()["success"]


@pytest.fixture(scope="module")
def served(
    model: Path, vanilla: Vanilla, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    expected = vanilla(model, (BURST,))
    with Servers(tmp_path_factory.mktemp("sg"), NUM_PAGES * PAGE) as servers:
        server = start_yielding(servers, NAME, model)
        yield Served(servers, server, model, expected)
        log = server.log.read_text()
        assert server.process.poll() is None
    assert "leak detected" not in log


@pytest.fixture
def neighbour(served: Served) -> Iterator[Neighbour]:
    """Another instance on the device."""
    made = Neighbour(
        read_config(
            {
                "KVCACHED_DIR": str(served.servers.directory),
                "KVCACHED_HOST_POOL": str(NUM_PAGES * PAGE),
                "KVCACHED_NAME": "neighbour",
            }
        )
    )
    yield made
    made.close()


def test_greedy_tokens_are_vanillas_on_weights_that_were_taken_over(served: Served) -> None:
    served.check()
    assert served.num_weights == NUM_WEIGHTS


def test_tokens_stay_the_same_when_all_weights_have_gone_and_come(served: Served) -> None:
    for _ in range(3):
        served.sleep()
        served.check()
        assert served.num_weights == NUM_WEIGHTS


@pytest.mark.parametrize("num_left", range(NUM_WEIGHTS))
def test_tokens_stay_the_same_when_some_of_the_weights_have_gone(
    served: Served, neighbour: Neighbour, num_left: int
) -> None:
    post(f"{served.server.url}/flush_cache")
    num_pages = NUM_PAGES - 1 - num_left
    await_that(
        lambda: (
            neighbour.take(num_pages - num_taken(neighbour)) is not None
            and num_taken(neighbour) == num_pages
        ),
    )
    assert served.num_weights == num_left
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(served.check)
        await_that(lambda: served.servers.view(NAME).is_waking)
        assert served.num_weights == num_left
        neighbour.rest(num_pages)
        neighbour.give(num_pages)
        asked.result(timeout=PATIENCE_SECONDS)
    assert served.num_weights == NUM_WEIGHTS


def num_taken(neighbour: Neighbour) -> int:
    return neighbour.view().used_bytes // PAGE


def test_a_paused_server_gives_its_weights(served: Served, neighbour: Neighbour) -> None:
    served.check()
    served.ask("pause_generation", mode="in_place")
    await_that(lambda: neighbour.take(NUM_PAGES) and served.num_weights == 0)
    num_pages = num_taken(neighbour)
    neighbour.rest(num_pages)
    neighbour.give(num_pages)
    served.ask("continue_generation")
    served.check()


def test_health_checks_are_answered_and_wake_nothing(served: Served) -> None:
    served.sleep()
    for path in ("health", "health_generate"):
        assert (
            httpx.get(f"{served.server.url}/{path}", timeout=PATIENCE_SECONDS).status_code
            == httpx.codes.OK
        )
        assert served.num_weights == 0
    served.check()


def test_weights_are_read_and_saved_from_a_server_that_gave_them(served: Served) -> None:
    def ask() -> Any:
        name = "model.layers.0.self_attn.q_proj.weight"
        return served.ask("get_weights_by_name", name=name).json()

    expected = ask()
    assert len(expected) > 0
    served.sleep()
    assert ask() == expected


def test_one_wrong_page_changes_the_answer(served: Served) -> None:
    # Behind an update the server would read pages of its own in the place of this file's.
    (image,) = (served.servers.workspace / "weights").glob("*.image")
    served.sleep()
    with image.open("r+b") as file:
        file.seek(3 * PAGE)
        file.write(bytes(PAGE))
    assert answers(served.server, [BURST]) != served.expected
    served.load(served.model)
    served.check()


def test_weights_that_were_updated_come_back_as_they_are_now(
    served: Served, vanilla: Vanilla, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=2)
    expected = vanilla(other, (BURST,))
    assert expected != served.expected
    served.sleep()
    served.load(other)
    assert answers(served.server, [BURST]) == expected
    served.sleep()
    assert answers(served.server, [BURST]) == expected
    served.load(served.model)
    served.check()
    served.sleep()
    served.check()


def test_released_weights_are_gone_until_they_are_resumed(served: Served) -> None:
    served.ask("release_memory_occupation", tags=["weights", "kv_cache"])
    assert served.servers.view(NAME).resident_bytes == PAGE
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(served.check)
        await_that(lambda: served.num_weights == 0 and not asked.done())
        served.ask("resume_memory_occupation", tags=["weights", "kv_cache"])
        asked.result(timeout=PATIENCE_SECONDS)
    assert served.num_weights == NUM_WEIGHTS
