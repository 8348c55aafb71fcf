"""When the client of the benchmark of offloading asks, and what it makes of the answers."""

from typing import Any

import pytest
from multi_model.client import OPENAI, Record
from parts import offload_client
from parts.offload_client import AT_ONCE, bench, schedule


def test_all_come_at_once_or_at_random_moments_that_a_seed_gives_again() -> None:
    at_once = schedule(20, 8, AT_ONCE, 5, seed=1).requests
    assert [one.at_seconds for one in at_once] == [0.0] * 5
    assert {(one.num_in, one.num_out) for one in at_once} == {(20, 8)}
    moments = [one.at_seconds for one in schedule(20, 8, "4", 400, seed=1).requests]
    assert moments == sorted(moments)
    assert 80 < moments[-1] < 120
    assert moments == [one.at_seconds for one in schedule(20, 8, "4", 400, seed=1).requests]
    assert moments != [one.at_seconds for one in schedule(20, 8, "4", 400, seed=2).requests]


def answered(*records: Record) -> Any:
    async def replay(*_: Any, **__: Any) -> list[Record]:
        return list(records)

    return replay


def test_figures_are_those_of_requests_that_were_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Record(0, 0.0, 20, 5, num_tokens=5, ttft_seconds=0.5, last_seconds=2.5)
    lost = Record(0, 0.0, 20, 5, num_tokens=2, ttft_seconds=0.1, last_seconds=9.0, error="lost")
    server: Any = type("Server", (), {"url": "http://here", "name": "m"})
    workload = schedule(20, 5, AT_ONCE, 2, seed=0)
    monkeypatch.setattr(offload_client, "replay", answered(one, lost))
    figures = bench(server, OPENAI, workload, seed=0)
    assert figures["output_throughput"] == 2.0
    assert (figures["completed"], figures["failed"], figures["duration"]) == (1, 1, 2.5)
    assert (figures["mean_ttft_ms"], figures["mean_tpot_ms"]) == (500.0, 500.0)
    monkeypatch.setattr(offload_client, "replay", answered(lost))
    with pytest.raises(RuntimeError, match="m answered no request: lost"):
        bench(server, OPENAI, workload, seed=0)
