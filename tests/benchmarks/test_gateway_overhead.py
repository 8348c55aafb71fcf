"""What the gateway and LiteLLM's proxy are asked, in turn."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gateway_overhead
import pytest
from parts.gateway_load import Taken
from parts.intervals import NUM_FOR_P99


def test_each_way_is_asked_the_same_and_enough_for_a_99th_percentile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, list[tuple[bytes, int, int]]] = defaultdict(list)

    def serve(name: str) -> Any:
        @contextlib.contextmanager
        def served(*_words: Any) -> Iterator[Any]:
            yield SimpleNamespace(port=1, name=name)

        return served

    def load(server: Any, data: bytes, *, num: int, at_once: int) -> tuple[list[Taken], float]:
        asked[server.name].append((data, num, at_once))
        seconds = 1.0 + names.index(server.name)
        return [Taken(seconds, seconds, 1)] * num, seconds

    names = ("standin", "gateway", "litellm")
    house = SimpleNamespace(**{name: serve(name) for name in names})
    monkeypatch.setattr(gateway_overhead, "gateway_house", house)
    monkeypatch.setattr(gateway_overhead, "load", load)
    monkeypatch.setattr(gateway_overhead, "_litellm_release", lambda _python: "1")
    found = gateway_overhead.compare(Path("python"), 2)
    assert set(found["rounds"]) == {"direct", "gateway", "litellm"}
    assert asked["gateway"] == asked["litellm"] == asked["standin"]
    assert asked["gateway"][1][1:] == (NUM_FOR_P99, 1)
