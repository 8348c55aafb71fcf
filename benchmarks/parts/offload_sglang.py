"""SGLang's servers of `offload.py`: HiCache in the place of vLLM's offloading."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multi_model.client import SGLANG as SGLANG_DIALECT
from parts.offload_servers import PATIENCE_SECONDS, Kind, Sizes
from parts.record import Record, begin_record
from parts.sglang_servers import GPU_OPTIONS, SGLangSetting
from parts.tier_counts import host_counts
from parts.vllm_servers import kv_bytes_per_token, served

from kvcached_core.weights.host_tier import HOST, TierCounts
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN
from kvcached_demo.harness.server import EngineServer

GB_BYTES = 10**9  # what SGLang counts its tier in


class SglangKind(Kind):
    """SGLang's servers. What vanilla copies is not counted: nothing of it is needed."""

    dialect = SGLANG_DIALECT

    def __init__(self, setting: SGLangSetting) -> None:
        self._setting = setting
        self.kv_bytes_per_token = (
            KV_BYTES_PER_TOKEN if setting.tiny else kv_bytes_per_token("llama-8b")
        )

    def start(self, name: str, sizes: Sizes, *, elastic: bool, has_tier: bool) -> None:
        """See `Kind.start`."""
        setting = self._setting
        more: dict[str, str] = {"PYTHONPATH": ""}
        if setting.tiny:  # SGLang's own copies need a GPU
            from helpers.engine_plugin import add_plugin
            from helpers.hicache_copier_settings import DELAY_MS

            plugin = add_plugin(setting.servers.workspace / "plugin", "helpers.hicache_plugin")
            more = plugin | {DELAY_MS: "0,5"}
        size = SGLANG.size(
            sizes.kv_bytes, self.kv_bytes_per_token, is_elastic=elastic, is_host=setting.tiny
        )
        options = SGLANG.host_options if setting.tiny else GPU_OPTIONS
        length = () if setting.tiny else SGLANG.longest(max(sizes.long_tokens, 8192) + 256)
        setting.servers.start(
            SGLANG,
            name,
            setting.model,
            *size,
            *length,
            *(self._tier(sizes) if has_tier else ()),
            *sizes.server_options,
            is_elastic=elastic,
            limit_bytes=sizes.kv_bytes,
            options=options,
            environ=sizes.environ | more,
        )

    def answer(self, server: EngineServer, prompt: list[int], num_tokens: int) -> list[int]:
        """See `Kind.answer`."""
        sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        answer = server.post("/generate", body, PATIENCE_SECONDS)
        answer.raise_for_status()
        found: list[int] = answer.json()["output_ids"]
        return found

    def copied(self, server: EngineServer, word: str) -> tuple[float, float]:
        """See `Kind.copied`."""
        counts = host_counts(self._setting.servers.directory).get(server.name, TierCounts(HOST))
        if word == "store":
            return float(counts.stored_bytes), counts.store_seconds
        return float(counts.loaded_bytes), counts.load_seconds

    def reset(self, server: EngineServer) -> None:
        """See `Kind.reset`."""
        raise NotImplementedError(f"{server.name}: SGLang forgets the host tier with its cache")

    def _tier(self, sizes: Sizes) -> tuple[str, ...]:
        num_gb = max(sizes.tier_bytes // GB_BYTES, 1)
        return ("--enable-hierarchical-cache", "--hicache-size", str(num_gb))


@contextlib.contextmanager
def sglang_run(options: argparse.Namespace) -> Iterator[tuple[Any, Record]]:
    """Make a folder and a record; keep the ends of the servers' logs, also when it is cut off."""
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        record = begin_record(options)
        setting: Any = SGLangSetting(Path(folder), tiny=options.tiny)
        setting.kind = SglangKind(setting)
        with served(setting.servers, options.json):
            yield setting, record
