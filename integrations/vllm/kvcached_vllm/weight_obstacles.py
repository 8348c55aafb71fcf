"""What of vLLM keeps a model's weights where they are, each with the setting to change."""

from collections.abc import Iterator
from typing import Any

# The load format whose weights lie in another process's memory.
SHARED_FORMAT = "ipc_cache"


def weight_obstacles(vllm_config: Any) -> Iterator[str]:
    """Yield why the weights of this configuration stay, though its KV cache is elastic.

    All of these keep addresses of weights, or move weights by themselves.
    """
    offload = vllm_config.offload_config
    if vllm_config.parallel_config.enable_eplb:
        yield "experts are moved between ranks; remove --enable-eplb"
    if vllm_config.parallel_config.data_parallel_size > 1:  # with experts; other ranks are alone
        yield "an idle rank computes for others; start one server for each rank"
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        yield "vLLM offloads layers itself; remove --cpu-offload-gb and --offload-group-size"
    if vllm_config.weight_transfer_config is not None:
        yield "a trainer may write to weights; remove --weight-transfer-config"
    if vllm_config.load_config.load_format == SHARED_FORMAT:
        yield f"a daemon has the weights; remove --load-format {SHARED_FORMAT}"
    if getattr(vllm_config, "engram_config", None) is not None:
        yield "tables of n-grams are read by their addresses; remove --engram-config"
