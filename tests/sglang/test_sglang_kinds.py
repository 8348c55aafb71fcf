"""Models that answer with something else than tokens are served, and said to be."""

from pathlib import Path

import pytest
from helpers.sglang_engine import PAGE_BYTES, POOL, READY_SECONDS, start_sglang, trims_to
from helpers.speculating_server import prompts
from helpers.waiting import await_that

from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang]


def embed(model: Path, folder: Path, *, is_elastic: bool) -> list[list[float]]:
    """Return what a server makes of prompts; an elastic one has given its memory back then."""
    folder.mkdir()
    with Servers(folder, POOL) as servers:
        server = start_sglang(servers, "embedding", model, "--is-embedding", elastic=is_elastic)
        server.wait_ready(READY_SECONDS)
        answer = server.post("/v1/embeddings", {"model": "embedding", "input": prompts(1, 12, 300)})
        answer.raise_for_status()
        if is_elastic:
            await_that(lambda: trims_to(server, folder / "kv", 2 * PAGE_BYTES))
            assert server.log.read_text().count("this server embeds or scores prompts") == 1
        return [each["embedding"] for each in answer.json()["data"]]


@pytest.mark.slow
@pytest.mark.every_release
def test_a_model_that_embeds_prompts_is_elastic(model: Path, tmp_path: Path) -> None:
    vanilla = embed(model, tmp_path / "vanilla", is_elastic=False)
    assert embed(model, tmp_path / "elastic", is_elastic=True) == vanilla
    assert len({tuple(each) for each in vanilla}) == len(vanilla)
