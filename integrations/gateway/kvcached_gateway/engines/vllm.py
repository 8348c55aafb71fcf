"""vLLM's words. It listens on a Unix socket, which nobody but we can reach, so it has no key."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from kvcached_gateway.engines.words import (
    CONNECTION_SECONDS,
    OUT_OF_MEMORY,
    PROMPT,
    EngineWords,
    Question,
)
from kvcached_gateway.errors import EngineStartError
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.config import Environment, ModelSettings

MAX_PATH_BYTES = 107  # what the kernel has room for, less the zero behind it
NUM_DIGITS = 12


class VllmWords(EngineWords):
    """How vLLM is started and asked."""

    name = "vllm"
    ready_path = "/health"
    load_path = "/v1/load_lora_adapter"
    unload_path = "/v1/unload_lora_adapter"
    counters = (
        ("vllm:num_requests_running", ""),
        ("vllm:num_requests_waiting", ""),
        ("vllm:prompt_tokens_total", ""),
        ("vllm:prefix_cache_hits_total", ""),
        ("vllm:generation_tokens_total", ""),
    )
    out_of_memory: ClassVar = (*OUT_OF_MEMORY, "No available memory for the cache blocks")
    adapter_flags = ("--max-cpu-loras", "--max-loras")
    num_adapters = 1
    length_flag = "--max-model-len"

    def address(self, folder: Path, name: str) -> Address:
        """See `EngineWords.address`.

        Raises:
            EngineStartError: If the folder's path is too long for a socket.
        """
        digest = hashlib.sha256(name.encode()).hexdigest()[:NUM_DIGITS]
        for stem in (name, digest):
            path = str(folder / f"{stem}.sock")
            if len(path.encode()) <= MAX_PATH_BYTES:
                return Address("http://localhost", path, is_ours=True)
        raise EngineStartError(
            f"{path} is too long for a socket: {MAX_PATH_BYTES} bytes are allowed; "
            "set KVCACHED_DIR to a folder with a shorter path"
        )

    def command(
        self,
        settings: ModelSettings,
        environment: Environment,
        devices: Sequence[str],
        address: Address,
        keys: Path,
    ) -> list[str]:
        """See `EngineWords.command`."""
        del devices, keys  # the one is a variable, and there are none of the others
        words = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "serve"]
        words += [str(settings.model), "--served-model-name", settings.id, *settings.aliases]
        words += ["--uds", str(address.socket), "--disable-uvicorn-access-log"]
        if settings.revision is not None:
            words += ["--revision", settings.revision]
        if settings.tensor_parallel > 1:
            words += ["--tensor-parallel-size", str(settings.tensor_parallel)]
        return [*words, *environment.args, *settings.args]

    def environ(
        self, settings: ModelSettings, environment: Environment, devices: Sequence[str]
    ) -> dict[str, str]:
        """See `EngineWords.environ`; adapters come and go, and developers' paths are shut."""
        return super().environ(settings, environment, devices) | {
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(CONNECTION_SECONDS),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_SERVER_DEV_MODE": "0",
        }

    def question(self, settings: ModelSettings) -> Question:
        """See `EngineWords.question`; models that score have this path, too, and no embeddings."""
        if settings.kind == "pooling":
            return Question("/pooling", {"model": settings.id, "input": PROMPT})
        return super().question(settings)

    def adapter_name(self, base: ModelSettings, adapter: str) -> str:
        """See `EngineWords.adapter_name`: any name."""
        del base
        return adapter
