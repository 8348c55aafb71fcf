"""A vLLM engine in this process whose blocks are copied to the host, and what is done to it.

Nothing of vLLM stands in here but its copier (`delayed_copier`).
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.offline import ENGINE_OPTIONS
from helpers.offload_plugin import transfer

MIB = 1 << 20
IS_ELASTIC = os.environ.get("ENABLE_KVCACHED", "0") != "0"
BLOCK_TOKENS = 32  # a chunk of the host tier is a block, or `blocks_per_chunk` of the copier
SAMPLING: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


class Offloaded:
    """One engine, stepped by hand.

    Args:
        model: Its folder.
        copier: What `transfer` takes; None for an engine without a connector.
        options: Further arguments of `LLM`.
    """

    def __init__(self, model: str, copier: dict[str, Any] | None, **options: Any) -> None:
        from vllm import LLM

        sizes = {} if IS_ELASTIC else {"kv_cache_memory_bytes": 512 * MIB}
        connector = {} if copier is None else {"kv_transfer_config": transfer(**copier)}
        settings = ENGINE_OPTIONS | {"disable_log_stats": False} | sizes | connector | options
        self.llm = LLM(model, **settings, enable_prefix_caching=True)
        self._numbers = itertools.count()
        chunk_blocks: int = (copier or {}).get("blocks_per_chunk", 1)
        self._chunk_tokens = BLOCK_TOKENS * chunk_blocks
        self._report = None if copier is None else copier.get("copier_report")
        self.core: Any = getattr(self.llm.llm_engine.engine_core, "engine_core", None)

    def generate(self, prompts: Sequence[list[int]], num_tokens: int = 12) -> list[list[int]]:
        """Return what all prompts at once are answered."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=num_tokens, **SAMPLING)
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def answer(self, prompts: Sequence[list[int]], num_tokens: int = 12) -> list[list[int]]:
        """As `generate`, without the steps behind the last token: copies may be open afterwards."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        sampling = SamplingParams(max_tokens=num_tokens, **SAMPLING)
        asked = {f"answered-{next(self._numbers)}": prompt for prompt in prompts}
        for request_id, prompt in asked.items():
            engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
        tokens: dict[str, list[int]] = {}
        while len(tokens) < len(asked):
            for output in engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
        return [tokens[request_id] for request_id in asked]

    def finish(self) -> int:
        """Step until nothing is left to do, copies included; return how many steps it was."""
        num_steps = 0
        while self.core.scheduler.has_requests():
            self.llm.llm_engine.step()
            num_steps += 1
        return num_steps

    def trim(self) -> None:
        """Ask the engine for all that no request needs, and let it look once.

        How much that is the ledger says, so it has to know of all steps.
        """
        self.resident_pages()
        self.trim_known()

    def trim_known(self) -> None:
        """As `trim`, for what the ledger knows: workers may be a step behind."""
        from kvcached_core.config import read_config
        from kvcached_core.control import trim

        names = [self.core.kvcached.instance.name]
        trim(names, directory=read_config().dir, wait_seconds=0)
        self.core.kvcached.between_steps()

    def limit(self, limit: str) -> None:
        """Set the most that the engine may hold, and let it look once."""
        from kvcached_core.config import read_config
        from kvcached_core.control import set_limit

        engine = self.core.kvcached
        set_limit(engine.instance.name, limit, directory=read_config().dir, wait_seconds=0)
        engine.between_steps()

    def num_blocks_within_limit(self) -> int:
        """Return how many blocks requests can have at the same time; one is vLLM's own."""
        from kvcached_core.config import read_config
        from kvcached_core.ledger.ledger import Ledger

        geometry = self.core.kvcached.geometry
        with Ledger(read_config().dir / "host.ledger") as ledger:
            (view,) = ledger.view().instances
        num_pages: int = view.limit_bytes // geometry.page_bytes
        blocks_per_page: int = geometry.blocks_per_page
        return num_pages * blocks_per_page - 1

    def resident_pages(self) -> list[list[int]]:
        """Return the pages that each rank has mapped, all orders carried out."""
        from helpers.offline import resident_pages

        pages: list[list[int]] = self.core.model_executor.collective_rpc(resident_pages)
        return pages

    def hits(self) -> int:
        """Return how many tokens the connector found, since the start."""
        return self.count("vllm:external_prefix_cache_hits")

    def count(self, name: str) -> int:
        """Return one of vLLM's counters."""
        return sum(int(each.value) for each in self.llm.get_metrics() if each.name == name)

    def copied(self) -> dict[str, int]:
        """Return what the copier says that it did."""
        assert self._report is not None
        report: dict[str, int] = json.loads(Path(self._report).read_text())
        return report

    def full_chunk_tokens(self, prompt: Sequence[int]) -> int:
        """Return what of a prompt a tier of whole chunks can have; the last token is computed."""
        return (len(prompt) - 1) // self._chunk_tokens * self._chunk_tokens
