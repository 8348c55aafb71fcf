"""Asking a server of the benchmark of offloading for memory, as a neighbour that waits does."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from parts.offload_servers import give_back

from kvcached_core.config import HOST, read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.devices import Device
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.host import HostBackend, HostFence
from kvcached_core.units import MIB

GEOMETRY = choose_geometry(
    block_bytes=65536, num_planes=4, granularity_bytes=2 * MIB, target_page_bytes=2 * MIB
)
PAGE = GEOMETRY.page_bytes
NUM_PAGES = 16
POOL = Device(HOST, "host", 64 * PAGE)


class Gated(HostBackend):
    """Unmaps nothing until `gate` is open, as behind a step that runs."""

    gate = threading.Event()

    def fence(self, stream: int) -> HostFence:
        fence: Any = SimpleNamespace(wait=self.gate.wait)
        return super().fence(stream) if self.gate.is_set() else fence


class Server:
    """An engine in the ledger, all of whose pages are cached.

    It gives what is asked. Before the first page goes, a request comes that takes two again.
    """

    def __init__(self, folder: Path) -> None:
        config = read_config({"KVCACHED_DIR": str(folder)})
        self.instance = Instance(
            [POOL], config, name="plain", default_name="", engine="test", on_ring=self.answer
        )
        self.instance.describe(page_bytes=PAGE, num_pages=NUM_PAGES)
        self.instance.promise(NUM_PAGES, is_urgent=False)
        self.seat = self.instance.seat(POOL)
        self.backend = Gated()
        self.memory = RankMemory(GEOMETRY, NUM_PAGES, self.seat, self.backend)
        self.cached = list(range(1, NUM_PAGES))
        self.memory.carry_out(PageOrders(self.cached[:], [], [], [], 1, NUM_PAGES - 1))
        self.taken: list[int] = []

    def answer(self) -> None:
        num_pages, _ = self.instance.wanted_pages()
        pages, self.cached = self.cached[:num_pages], self.cached[num_pages:]
        self.instance.acknowledge(len(pages))
        num_used = 1 + len(self.taken)
        self.memory.apply(PageOrders([], [], [], pages, num_used, len(self.cached)))
        if not self.taken:
            self.taken = pages[-2:]
            assert self.instance.promise(2, is_urgent=True) == 2
            self.memory.before_step(PageOrders(self.taken[:], [], [], [], 3, len(self.cached)))
            self.backend.gate.set()

    def close(self) -> None:
        self.memory.close()
        self.instance.close()


def test_what_a_server_keeps_for_a_request_of_its_own_is_asked_for_again(tmp_path: Path) -> None:
    server = Server(tmp_path / "kv")
    servers = SimpleNamespace(open_ledger=lambda: Ledger(Path(server.seat.ledger_path)))
    bench: Any = SimpleNamespace(setting=SimpleNamespace(servers=servers))
    given = give_back(bench, "plain", 8 * PAGE)
    resident = server.memory.arena.resident_pages
    assert (given["num_asks"], given["num_unmaps"]) == (2, 8)
    assert sorted(resident) == sorted([0, *server.taken, *server.cached])
    server.close()
