"""Which of vLLM's KV connectors are served, and what to set in the place of those that are not."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

# vLLM's own offloading. Its connector reads our memory through the tensors that vLLM has of it.
CONNECTOR = "OffloadingConnector"
# What copies for it, and what lies below the host's memory. Specs and tiers by other names may
# read the device in ways of their own.
SERVED_SPECS = {"CPUOffloadingSpec", "TieringOffloadingSpec"}
SERVED_TIERS = {"fs"}

# A module of the first release that stores the last blocks of a request when it has ended.
_FIRST_MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.config"

_INSTEAD = "set --kv-offloading-size alone for vLLM's own offloading, or remove it"
_REGISTERS = "it registers the KV cache's addresses with a device once, and we unmap them"
_EXPORTS = (
    "it hands the KV cache to another process, which would keep memory that we give back; set "
    "--kv-offloading-backend native"
)

REASONS = {
    "SimpleCPUOffloadConnector": (
        "it would copy layer 0 only; unset VLLM_USE_SIMPLE_KV_OFFLOAD, so that "
        f"--kv-offloading-size means {CONNECTOR}"
    ),
    "LMCacheMPConnector": _EXPORTS,
    "LMCacheConnectorV1": (
        f"nobody has tried it on memory that comes and goes; {_INSTEAD} from --kv-transfer-config"
    ),
    "MultiConnector": f"name one connector alone, {CONNECTOR}, in --kv-transfer-config",
    **dict.fromkeys(
        (
            "HF3FSKVConnector",
            "MoRIIOConnector",
            "MooncakeConnector",
            "MooncakeStoreConnector",
            "NixlConnector",
            "NixlPullConnector",
            "NixlPushConnector",
        ),
        f"{_REGISTERS}; {_INSTEAD} from --kv-transfer-config",
    ),
}
_OTHER = f"it may hold addresses that we unmap; {_INSTEAD} from --kv-transfer-config"


def connector_obstacles(transfer_config: Any) -> Iterator[str]:
    """Yield why a `KVTransferConfig` cannot be served, and the setting to change."""
    if transfer_config is None or transfer_config.kv_connector is None:
        return
    name = transfer_config.kv_connector
    if name != CONNECTOR or transfer_config.kv_connector_module_path:
        yield f"KV connector {name}: {REASONS.get(name, _OTHER)}"
        return
    if find_spec(_FIRST_MODULE) is None:
        yield (
            f"KV connector {name}: this release forgets the last blocks of a request; install vLLM "
            "0.26 or newer, or remove --kv-offloading-size"
        )
        return
    extra = transfer_config.kv_connector_extra_config
    spec = extra.get("spec_name", "CPUOffloadingSpec")
    if spec not in SERVED_SPECS:
        yield f"offloading spec {spec}: set spec_name to one of {', '.join(sorted(SERVED_SPECS))}"
    for tier in extra.get("secondary_tiers", ()):
        if tier.get("type") not in SERVED_TIERS:
            yield (
                f"offloading tier {tier.get('type')}: nobody has tried it; set the type of each of "
                f"secondary_tiers to {' or '.join(sorted(SERVED_TIERS))}"
            )


def offloads(vllm_config: Any) -> bool:
    """Return whether an engine with this configuration copies blocks to the host."""
    transfer_config = vllm_config.kv_transfer_config
    return transfer_config is not None and transfer_config.kv_connector == CONNECTOR
