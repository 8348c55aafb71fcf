"""vLLM's own offloading is served; every other connector is refused by its name."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.configurations import configuration
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvcached_core.engine.start import check
from kvcached_core.errors import UnsupportedEngineError
from kvcached_vllm import connectors
from kvcached_vllm.connectors import CONNECTOR, REASONS, offloads
from kvcached_vllm.obstacles import can_serve, obstacles

pytestmark = pytest.mark.vllm

OFFLOADING_SIZE = "set --kv-offloading-size alone for vLLM's own offloading"


def transfer(name: str | None = CONNECTOR, module: str | None = None, **extra: Any) -> Any:
    return configuration(
        kv_transfer_config=SimpleNamespace(
            kv_connector=name, kv_connector_module_path=module, kv_connector_extra_config=extra
        )
    )


@pytest.mark.parametrize(
    "extra",
    [
        {"cpu_bytes_to_use": 1 << 30},  # what --kv-offloading-size becomes
        {"spec_name": "CPUOffloadingSpec", "block_size": 64},
        {"spec_name": "TieringOffloadingSpec"},
        {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs"}]},
    ],
)
def test_vllms_own_offloading_is_served(extra: dict[str, Any]) -> None:
    config = transfer(**extra)
    check(obstacles(config))
    assert offloads(config)


def test_no_connector_is_no_offloading() -> None:
    assert can_serve(transfer(None))
    assert not offloads(configuration())


@pytest.mark.parametrize("name", sorted(KVConnectorFactory._registry.keys() - {CONNECTOR}))
def test_every_other_connector_of_vllm_is_refused_with_what_to_set(name: str) -> None:
    what = {
        "SimpleCPUOffloadConnector": "unset VLLM_USE_SIMPLE_KV_OFFLOAD, so that ",
        "LMCacheMPConnector": "set --kv-offloading-backend native",
        "MultiConnector": f"name one connector alone, {CONNECTOR}, in --kv-transfer-config",
    }.get(name, "set --kv-offloading-size alone for vLLM's own offloading, or remove it from ")
    with pytest.raises(UnsupportedEngineError, match=f"KV connector {name}: .*{what}"):
        check(obstacles(transfer(name)))
    assert not can_serve(transfer(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SimpleCPUOffloadConnector", "it would copy layer 0 only; unset VLLM_USE_SIMPLE"),
        ("LMCacheMPConnector", "another process.*set --kv-offloading-backend native"),
        ("NixlConnector", f"registers the KV cache's addresses.*{OFFLOADING_SIZE}"),
        ("MultiConnector", f"name one connector alone, {CONNECTOR}, in --kv-transfer-config"),
        ("SomebodysConnector", f"may hold addresses that we unmap; {OFFLOADING_SIZE}"),
    ],
)
def test_a_refusal_says_why(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=reason):
        check(obstacles(transfer(name)))


def test_a_connector_of_that_name_from_elsewhere_is_another_one() -> None:
    with pytest.raises(UnsupportedEngineError, match=f"KV connector {CONNECTOR}: it may hold"):
        check(obstacles(transfer(module="somebody.elses")))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (
            {"spec_name": "TheirSpec", "spec_module_path": "somebody.elses"},
            "offloading spec TheirSpec: set spec_name to one of CPUOffloadingSpec, Tiering",
        ),
        *(
            (
                {
                    "spec_name": "TieringOffloadingSpec",
                    "secondary_tiers": [{"type": "fs"}, {"type": kind}],
                },
                f"offloading tier {kind}: nobody has tried it; set the type.*to fs",
            )
            for kind in ("obj", "p2p", "kvcr", "example")
        ),
    ],
)
def test_specs_and_tiers_that_nobody_tried_are_refused(extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=reason):
        check(obstacles(transfer(**extra)))


def test_a_release_that_forgets_the_last_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedEngineError, match=r"install vLLM 0\.26 or newer"):
        check(obstacles(transfer()))


def test_reasons_are_for_others() -> None:
    assert CONNECTOR not in REASONS
