"""A real SGLang server on a CPU that is told several things at once: ranks, stages, drafts, a tier.

Stand-ins for what needs a GPU are in its processes, and what spoils blocks where a test wants that.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.engine_plugin import add_plugin
from helpers.hicache_copier_settings import DELAY_MS, GATE, REPORT, SPOILED
from helpers.hicache_server import HiCacheServer
from helpers.process_memory import resident_of_ranks
from helpers.sglang_engine import READY_SECONDS, cores_of, start_sglang
from helpers.spoiled_planes import DRAFT, TARGET, VARIABLE
from helpers.waiting import PATIENCE_SECONDS, await_that
from helpers.wrong_block import wrong_block_variables, wrong_blocks
from kvcached_core.control import trim
from kvcached_core.units import MIB
from kvcached_demo.harness.servers import Servers

NUM_ANSWER_TOKENS = 16
DISK = "disk"


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and how many that were drafted for it were right."""

    tokens: tuple[int, ...]
    accepted: int
    drafted: int


class Together(HiCacheServer):
    """A server of several ranks.

    Attributes:
        page_bytes: What a page takes of each rank, at most.
    """

    page_bytes: int

    def ask_all(
        self, prompts: Sequence[Sequence[int]], num_tokens: int = NUM_ANSWER_TOKENS
    ) -> list[Answer]:
        """Ask one prompt after the other."""
        return [_read(*self.answer(prompt, num_tokens)) for prompt in prompts]

    def resident(self) -> list[int]:
        """Return what each rank holds."""
        return resident_of_ranks(self.server)

    def lose_caches(self, num_pages: int = 1) -> None:
        """Have each rank give all but so many pages; right behind an answer more is in use."""

        def has_lost() -> bool:
            trim([], directory=self.directory, wait_seconds=PATIENCE_SECONDS)
            return max(self.resident()) <= num_pages * self.page_bytes

        await_that(has_lost)

    def flush(self) -> None:
        """Have nothing cached; SGLang refuses it as long as blocks are on their way to the disk."""
        await_that(lambda: self.server.post("/flush_cache").is_success)

    def settle_on_disk(self, num_blocks: int) -> None:
        """Wait until so many blocks are in files of the storage backend `file`."""
        await_that(lambda: len([*(self.folder / DISK).rglob("*.bin")]) >= num_blocks)

    def hits(self) -> list[int]:
        """Return how many tokens each instance has had back from the host."""
        return [view.counts[0].hit_tokens for view in self.tiers()]

    def reading_wrong_blocks(self) -> AbstractContextManager[None]:
        """Have the first block of each request be wrong."""
        return wrong_blocks(self.folder / "plugin")

    @contextmanager
    def spoiling(self, whose: str) -> Iterator[None]:
        """Have the keys that the target, or the draft, has of its prompts be nothing."""
        assert whose in (TARGET, DRAFT)
        file = self.folder / "planes"
        file.write_text(whose)
        try:
            yield
        finally:
            file.unlink()


def _read(tokens: list[int], said: Any) -> Answer:
    assert said["finish_reason"]["type"] == "length", said
    accepted = said.get("spec_num_correct_drafts", 0)
    return Answer(tuple(tokens), accepted, said.get("spec_num_proposed_drafts", 0))


@contextmanager
def together(
    model: Path,
    folder: Path,
    *arguments: str,
    elastic: bool = True,
    num_processes: int = 2,
    page_bytes: int = 2 * MIB,
    pool_bytes: int = 64 * MIB,
    plugins: Sequence[str] = (),
) -> Iterator[Together]:
    """Run a server; at the end it has to be alive, and to have told of no leak.

    Args:
        model: The model.
        folder: Where all of it is written.
        arguments: SGLang's.
        elastic: Whether it runs with kvcached.
        num_processes: Its ranks.
        page_bytes: How large a page is.
        pool_bytes: What there is to be had.
        plugins: Modules of the tests that its processes call.
    """
    variables = {
        "KVCACHED_DEBUG": "1",
        "TORCHDYNAMO_DISABLE": "1",  # to compile small functions takes a minute
        DELAY_MS: "5,20",
        GATE: str(folder / "gate"),
        "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(folder / DISK),
        REPORT: str(folder / "copied.json"),
        SPOILED: str(folder / "spoiled"),
        VARIABLE: str(folder / "planes"),
        **cores_of(num_processes),
        **wrong_block_variables(folder / "plugin"),
    }
    if "--pp-size" in arguments:
        variables["SGLANG_ENABLE_PP_SPEC"] = "1"  # stages may draft
    for plugin in plugins:
        variables |= add_plugin(folder / "plugin", plugin)
    with Servers(folder, pool_bytes) as servers:
        server = start_sglang(
            servers,
            "together",
            model,
            *("--mem-fraction-static", "0.7"),  # others on this machine take memory meanwhile
            *arguments,
            elastic=elastic,
            page_bytes=page_bytes,
            pool_bytes=pool_bytes,
            variables=variables,
        )
        server.wait_ready(READY_SECONDS)
        made = Together(server, servers, folder)
        made.page_bytes = page_bytes
        yield made
        log = server.log.read_text()
        assert server.process.poll() is None, log[-4000:]
    assert "leak detected" not in log
    assert ("kvcached: process" in log) == elastic
