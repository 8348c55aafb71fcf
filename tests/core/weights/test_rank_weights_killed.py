"""A process that is killed while its weights go or come leaves nothing taken, and a good copy."""

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.forked import exit_code_of_child
from helpers.weight_ranks import NUM_PAGES, PAGE, WeightedRank

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB


class Deadly(HostBackend):
    """Memory whose user is killed in the place of one call."""

    def __init__(self, verb: str, number: int) -> None:
        super().__init__(PAGE)
        self.is_armed = False
        self._verb, self._number = verb, number

    def _count(self, verb: str) -> None:
        if self.is_armed and verb == self._verb:
            self._number -= 1
            if not self._number:
                os.kill(os.getpid(), signal.SIGKILL)

    def map(self, address: int, handle: object) -> None:
        self._count("map")
        super().map(address, handle)  # type: ignore[arg-type]  # a handle of this backend

    def unmap(self, address: int, handle: object) -> None:
        self._count("unmap")
        super().unmap(address, handle)  # type: ignore[arg-type]  # a handle of this backend

    def copy_in(self, address: int, host_address: int, num_bytes: int) -> None:
        self._count("copy_in")
        super().copy_in(address, host_address, num_bytes)


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        *(("unmap", number) for number in (1, 8, 9, NUM_PAGES)),
        *(("map", number) for number in (1, 5, NUM_PAGES)),
        *(("copy_in", number) for number in (1, 6)),
    ],
)
def test_nothing_stays_taken_and_the_next_start_finds_its_copy(
    tmp_path: Path, verb: str, number: int
) -> None:
    def give_and_bring() -> None:
        torch.set_num_threads(1)
        memory = Deadly(verb, number)
        ours = WeightedRank(memory, tmp_path).start()
        memory.is_armed = True
        ours.weights.hold(0)
        ours.weights.hold(NUM_PAGES)

    assert exit_code_of_child(give_and_bring) == -signal.SIGKILL
    with Ledger(tmp_path / "gpu.ledger", GIB) as ledger:
        other = ledger.register(name="other", engine="test")
        assert [view.name for view in ledger.view().instances] == ["other"]
        assert ledger.promise(other, GIB, PAGE) == GIB
        ledger.unregister(other)
    again = WeightedRank(HostBackend(PAGE), tmp_path)
    copied = []
    copy_out = again.image.backend.copy_out
    again.image.backend.copy_out = lambda *args: copied.append(copy_out(*args))  # type: ignore[method-assign]  # it counts
    try:
        again.start()
        assert copied == []
        again.weights.hold(0)
        again.weights.hold(NUM_PAGES)
        again.check(NUM_PAGES)
    finally:
        again.close()
