"""A captured graph answers as before after its memory, and its buffers, went and came."""

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import MIB
from kvcached_core.weights import scratch as scratch_module
from kvcached_core.weights.annex import Annex
from kvcached_core.weights.graph_pool import TorchPool
from kvcached_core.weights.scratch import Scratch, find_scratch

pytestmark = pytest.mark.gpu

SIDE = 2048
ROUNDS = 5


class Home:
    """An annex on the device, and pinned host memory for it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
        self.annex = Annex(CudaBackend(), self._room)
        self.pool = TorchPool(self.annex)

    def come_and_go(self) -> int:
        """Drop all and bring it back; return what that gave of the device meanwhile."""
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        self.annex.drop()
        torch.cuda.empty_cache()
        given = torch.cuda.mem_get_info()[0] - before
        self.annex.bring()
        stream = int(torch.cuda.current_stream().cuda_stream)
        self.annex.backend.join(stream)
        self.annex.backend.join_copies(stream)
        return given

    def _room(self, num_bytes: int) -> int:
        assert num_bytes <= self._bytes.numel()
        return self._bytes.data_ptr()


@pytest.fixture
def home() -> Iterator[Home]:
    made = Home()
    yield made
    torch.cuda.synchronize()
    made.annex.close()


def captured(home: Home, work: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Return a graph of `work` in the pool, and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=home.pool.id):
        answer = work()
    return graph, answer


def test_graphs_answer_as_before_and_their_memory_was_gone(home: Home) -> None:
    first = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    second = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)

    def work() -> torch.Tensor:
        table = torch.arange(SIDE, device="cuda", dtype=torch.bfloat16)
        hidden = torch.relu(first @ second) + table
        return (hidden @ second).float().softmax(dim=-1)

    graphs = [captured(home, work) for _ in range(3)]
    num_bytes = home.pool.memory.num_bytes
    assert num_bytes >= 3 * 4 * SIDE * SIDE  # each keeps its answer
    graphs[0][0].replay()
    expected = graphs[0][1].clone()
    for _ in range(ROUNDS):
        assert home.come_and_go() >= num_bytes - 8 * MIB
        for graph, answer in graphs:
            graph.replay()
            assert answer.equal(expected)


def test_what_a_graph_reads_of_its_pool_and_never_writes_is_kept(home: Home) -> None:
    with torch.cuda.use_mem_pool(home.pool._pool):
        constant = torch.randn(SIDE, SIDE, device="cuda")
    graph, answer = captured(home, lambda: constant * 2)
    graph.replay()
    expected = answer.clone()
    for _ in range(ROUNDS):
        home.come_and_go()
        answer.zero_()
        graph.replay()
        assert answer.equal(expected)


def test_workspaces_of_cublas_go_and_products_stay_what_they_are(home: Home) -> None:
    left = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    expected = left @ left
    home.pool.take_workspaces()
    assert home.pool.memory.num_bytes >= MIB
    graph, answer = captured(home, lambda: left @ left)
    for _ in range(ROUNDS):
        home.come_and_go()
        graph.replay()
        assert answer.equal(expected)
        assert (left @ left).equal(expected)


def test_buffers_that_a_graph_has_the_addresses_of_come_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_module, "LEAST_SCRATCH_BYTES", MIB)
    runner = SimpleNamespace(
        counts=torch.zeros(SIDE, SIDE, device="cuda", dtype=torch.int32),
        table=torch.randn(SIDE, SIDE, device="cuda"),
    )
    device = torch.device("cuda", torch.cuda.current_device())
    groups = find_scratch(vars(runner), (), device)
    assert Scratch(home.annex).move(groups) == 2 * 4 * SIDE * SIDE

    def work() -> torch.Tensor:
        runner.counts.add_(1)
        return runner.table + runner.counts

    graph, answer = captured(home, work)
    table = runner.table.clone()
    for _ in range(ROUNDS):
        count = int(runner.counts[0, 0])
        home.come_and_go()
        graph.replay()
        assert runner.counts.eq(count + 1).all()
        assert answer.equal(table + (count + 1))


def test_a_page_that_is_spoiled_shows(home: Home) -> None:
    table = torch.randn(SIDE, SIDE, device="cuda")
    holder = SimpleNamespace(table=table)
    device = torch.device("cuda", torch.cuda.current_device())
    Scratch(home.annex).move(find_scratch(vars(holder), (), device))
    before = table.clone()
    torch.cuda.synchronize()
    home.annex.drop()
    ctypes.memset(home._bytes.data_ptr(), 1, 8)
    home.annex.bring()
    home.annex.backend.finish_copies()
    assert not table.equal(before)
