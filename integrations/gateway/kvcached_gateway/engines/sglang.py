"""SGLang's words. It listens on a port of the loopback, so each engine has a key of its own."""

import json
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from kvcached_gateway.engines.words import CONNECTION_SECONDS, OUT_OF_MEMORY, EngineWords
from kvcached_gateway.errors import EngineStartError
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.config import HOST, Environment, ModelSettings

LOOPBACK = "127.0.0.1"
PREFIX = "Bearer "
NUM_KEY_BYTES = 32


class SglangWords(EngineWords):
    """How SGLang is started and asked; it takes any name for its model's."""

    name = "sglang"
    ready_path = "/ready"
    load_path = "/load_lora_adapter"
    unload_path = "/unload_lora_adapter"
    counters = (
        ("sglang:num_running_reqs", ""),
        ("sglang:num_queue_reqs", ""),
        # `prompt_tokens_total` and the like move only when a request has ended.
        ("sglang:realtime_tokens_total", 'mode="prefill_'),
        ("sglang:realtime_tokens_total", 'mode="prefill_cache"'),
        ("sglang:realtime_tokens_total", 'mode="decode"'),
    )
    out_of_memory: ClassVar = (*OUT_OF_MEMORY, "Not enough memory")
    adapter_flags = ("--max-loaded-loras", "--max-loras-per-batch")
    num_adapters = 8
    length_flag = "--context-length"

    def address(self, folder: Path, name: str) -> Address:
        """See `EngineWords.address`."""
        del folder, name
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        key = secrets.token_urlsafe(NUM_KEY_BYTES)
        headers = {"Authorization": PREFIX + key}
        return Address(f"http://{LOOPBACK}:{port}", headers=headers, is_ours=True)

    def command(
        self,
        settings: ModelSettings,
        environment: Environment,
        devices: Sequence[str],
        address: Address,
        keys: Path,
    ) -> list[str]:
        """See `EngineWords.command`."""
        words = [str(environment.python), "-m", "sglang.launch_server", "--config", str(keys)]
        words += ["--model-path", str(settings.model), "--served-model-name", settings.id]
        words += ["--host", LOOPBACK, "--port", address.url.rpartition(":")[2]]
        words.append("--enable-metrics")
        if settings.revision is not None:
            words += ["--revision", settings.revision]
        if settings.tensor_parallel > 1:
            words += ["--tp-size", str(settings.tensor_parallel)]
        if tuple(devices) == (HOST,):
            words += ["--device", "cpu"]
        if settings.kind == "pooling":
            words.append("--is-embedding")
        return [*words, *environment.args, *settings.args]

    def key_file(self, address: Address) -> str:
        """See `EngineWords.key_file`: what its `--config` reads."""
        key = address.headers["Authorization"].removeprefix(PREFIX)
        return f"api-key: {json.dumps(key)}\n"

    def environ(
        self, settings: ModelSettings, environment: Environment, devices: Sequence[str]
    ) -> dict[str, str]:
        """See `EngineWords.environ`; another start may take memory of one of its devices alone."""
        variables = {"SGLANG_USE_CPU_ENGINE": "1"} if tuple(devices) == (HOST,) else {}
        if settings.tensor_parallel > 1:
            variables["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
        return (
            variables
            | super().environ(settings, environment, devices)
            | {"SGLANG_TIMEOUT_KEEP_ALIVE": str(CONNECTION_SECONDS)}
        )

    def serves(self, settings: ModelSettings, name: str) -> bool:
        """See `EngineWords.serves`: any name."""
        del settings, name
        return True

    def adapter_name(self, base: ModelSettings, adapter: str) -> str:
        """See `EngineWords.adapter_name`: clients have to write `BASE:NAME`.

        Raises:
            EngineStartError: If they write something else.
        """
        prefix = f"{base.id}:"
        if not adapter.startswith(prefix) or adapter == prefix:
            raise EngineStartError(
                f"SGLang finds the adapter {adapter!r} only under a name that begins with its "
                f"model's; call it '{prefix}...' in the file of models"
            )
        return adapter.removeprefix(prefix)
