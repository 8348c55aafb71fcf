"""A copy that nobody reads goes to the disk for another one, and is back before it is read."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.forked import exit_code_of_child
from helpers.waiting import await_that
from helpers.weight_pages import PagedLayout, Pages, Pins
from helpers.weight_ranks import KEY, NUM_PAGES, PAGE, WeightedRank

from kvcached_core.errors import HostBudgetError, HostCopyError
from kvcached_core.ledger.bell import ring
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB
from kvcached_core.weights import disk_store, host_budget, moving_out, offers
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.host_tier import HostTier
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.moves import read_moves
from kvcached_core.weights.open_copy import open_copy

OTHER_KEY = CopyKey("1" * 32, "qwen")
WHOLE_BYTES, WORDS = NUM_PAGES * PAGE, PAGE // 8
Make = Callable[..., WeightedRank]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return what makes a rank; host memory has room for the copy of one, and a disk for all."""
    made = []

    def make_one(backend: Backend, key: CopyKey = KEY, **settings: Any) -> WeightedRank:
        words = {
            "weights_dir": tmp_path / "weights",
            "weights_disk": tmp_path / "disk",
            "weights_disk_free": 0,
        }
        folder = tmp_path / f"kv{len(made)}"
        folder.mkdir()
        made.append(WeightedRank(backend, folder, NUM_PAGES, key=key, **(words | settings)))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def names(folder: Path) -> list[tuple[str, bool]]:
    return sorted((holder.name, holder.is_used) for holder in read_holders(folder))


def test_the_copy_of_a_sleeper_goes_for_another_and_comes_back_for_its_weights(
    make: Make, backend: Backend, tmp_path: Path
) -> None:
    ours = make(backend).start()
    ours.weights.hold(0)
    other = make(backend, OTHER_KEY).start()
    assert names(tmp_path / "weights") == [("qwen", True)]
    assert names(tmp_path / "disk") == [("llama", True)]
    for sleeper, waker in ((other, ours), (ours, other), (other, ours)):
        sleeper.weights.hold(0)
        assert waker.weights.hold(NUM_PAGES).num_missing_pages == 0
        waker.check(NUM_PAGES)
        assert len(names(tmp_path / "weights")) == 1
    moves = read_moves(tmp_path / "disk")
    assert (moves.num_written, moves.num_read) == (2, 3)


def test_the_copy_of_who_is_awake_goes_too_and_clean_weights_go_without_it(
    make: Make, tmp_path: Path
) -> None:
    ours = make(HostBackend(PAGE)).start()
    other = make(HostBackend(PAGE), OTHER_KEY).start()  # ours is awake
    assert names(tmp_path / "disk") == [("llama", True)]
    assert ours.weights.hold(7).num_resident_pages == 7
    ours.check(7)
    assert read_moves(tmp_path / "disk").num_read == 0
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    ours.check(NUM_PAGES)
    assert names(tmp_path / "disk") == [("llama", False), ("qwen", True)]
    other.check(NUM_PAGES)


def test_changed_weights_have_their_copy_back_before_they_go(make: Make, tmp_path: Path) -> None:
    ours = make(HostBackend(PAGE), host_budget=2 * WHOLE_BYTES).start()
    claim = make_budget(ours.config, GIB).claim("gemma", 2 * WHOLE_BYTES)
    ours.words()[5 * WORDS] += 1
    ours.content = ours.words().clone()
    assert (
        ours.weights.hold(0).num_resident_pages == NUM_PAGES - 8
    )  # the batch with that page stays
    claim.close()
    assert ours.weights.hold(0).num_resident_pages == 0
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_who_wakes_waits_for_room(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    ours = make(HostBackend(PAGE)).start()
    ours.weights.hold(0)
    monkeypatch.setattr(moving_out.time, "sleep", pauses.append)
    for number in (1, 2):
        claim = make_budget(ours.config, GIB).claim("gemma", WHOLE_BYTES)
        for _ in range(6 * number):
            found = ours.weights.hold(NUM_PAGES)
            assert (found.num_resident_pages, found.is_copied) == (0, True)
        claim.close()
        assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
        ours.check(NUM_PAGES)
        ours.weights.hold(0)
    more = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert [pause for pause in pauses if pause in more] == [*more, *more, *([2.0] * 6)]


def test_the_copy_that_was_read_last_goes_last(make: Make, tmp_path: Path) -> None:
    room = {"host_budget": 2 * WHOLE_BYTES}
    ours, other = (
        make(HostBackend(PAGE), **room).start(),
        make(HostBackend(PAGE), OTHER_KEY, **room),
    )
    other.start()
    for number, key in enumerate((KEY, OTHER_KEY)):
        os.utime(tmp_path / "weights" / f"{key.digest}.json", ns=(number, number))
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    make_budget(ours.config, GIB).claim("gemma", PAGE)
    assert names(tmp_path / "disk") == [("qwen", True)]


def test_who_is_not_asked_keeps_its_copy(make: Make, tmp_path: Path) -> None:
    ours = make(HostBackend(PAGE)).start()
    await_that(lambda: len(list((tmp_path / "weights").glob("*.bell"))) == 1)
    for num_pages in (0, NUM_PAGES, 3, NUM_PAGES):
        ours.weights.hold(num_pages)
        ours.check(num_pages)
        assert len(list((tmp_path / "weights").glob("*.bell"))) == 1
    assert not (tmp_path / "disk").exists()
    assert ours.done.count("register") == 0  # it stays page-locked


def test_a_copy_that_is_read_as_soon_as_it_is_complete_is_not_offered_meanwhile(
    make: Make, tmp_path: Path
) -> None:
    ours = make(HostBackend(PAGE)).start()
    assert offers.is_offered(ours.copy.path)
    moving = moving_out.MovingOut(ours.weights.copying, ours.open_copy, Pins())
    ours.weights.close()  # its own offer
    copy = ours.open_copy(threading.Event())
    assert copy is not None
    ours.weights.copying.copy = copy
    assert moving.back() is copy
    moving.offer_unread()  # whoever completed it is late
    assert not offers.is_offered(copy.path)
    moving.offer()
    assert offers.is_offered(copy.path)
    moving.close()
    copy.close()
    ours.weights.copying.copy = None


def test_a_copy_goes_when_the_device_has_read_what_it_was_told_to(
    make: Make, backend: Backend
) -> None:
    ours = make(backend).start()
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    ours.done.clear()
    make_budget(ours.config, GIB).claim("qwen", PAGE).close()
    assert ours.done.index("finish_copies") < ours.done.index("unregister")


def test_without_a_disk_nobody_is_asked(make: Make, tmp_path: Path) -> None:
    ours = make(HostBackend(PAGE), weights_disk=None).start()
    ours.weights.hold(0)
    assert list((tmp_path / "weights").glob("*.bell")) == []
    with pytest.raises(HostBudgetError, match=r"llama .* is in use"):
        make_budget(ours.config, GIB).claim("qwen", PAGE)


def test_one_flipped_byte_on_the_disk_is_found_before_it_is_a_weight(
    make: Make, tmp_path: Path
) -> None:
    ours = make(HostBackend(PAGE)).start()
    ours.weights.hold(0)
    make_budget(ours.config, GIB).claim("qwen", PAGE).close()
    path = tmp_path / "disk" / f"{KEY.digest}.image"
    with path.open("r+b") as file:
        file.seek(5 * PAGE + 3)
        before = file.read(1)
        file.seek(5 * PAGE + 3)
        file.write(bytes([before[0] ^ 1]))
    with pytest.raises(HostCopyError, match="is not what it was when the weights went there"):
        ours.weights.hold(NUM_PAGES)
    assert ours.image.num_resident_pages == 0
    assert names(tmp_path / "weights") == []


def test_an_image_that_a_sleeper_needs_is_not_removed_from_the_disk(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(HostBackend(PAGE)).start()
    ours.weights.hold(0)
    other = make(HostBackend(PAGE), OTHER_KEY).start()
    monkeypatch.setattr(disk_store, "room_bytes", lambda *_: 0)
    assert ours.weights.hold(NUM_PAGES).num_resident_pages == 0  # the other one's cannot go
    assert names(tmp_path / "disk") == [("llama", True)]
    other.weights.hold(0)
    assert other.weights.hold(NUM_PAGES).num_missing_pages == 0
    other.check(NUM_PAGES)
    monkeypatch.undo()
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    ours.check(NUM_PAGES)


def test_who_rings_before_the_bell_is_known_is_answered(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doorbell = moving_out.Doorbell

    def ring_at_once(path: Path, on_ring: Callable[[], None]) -> Any:
        answered = threading.Event()

        def answer() -> None:
            try:
                on_ring()
            finally:
                answered.set()

        bell = doorbell(path, answer)
        assert ring(path)
        assert answered.wait(30)
        return bell

    ours = make(HostBackend(PAGE)).start()
    assert offers.is_offered(ours.copy.path)
    monkeypatch.setattr(moving_out, "Doorbell", ring_at_once)
    monkeypatch.setattr(disk_store, "room_bytes", lambda *_: 0)  # it fails at once, too
    ours.weights.hold(NUM_PAGES - 1)
    ours.weights.hold(NUM_PAGES)
    assert list((tmp_path / "weights").glob("*.bell")) == []  # whoever rang waits for that
    ours.check(NUM_PAGES)


def test_who_wakes_while_its_copy_goes_has_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(HostBackend(PAGE)).start()
    ours.weights.hold(0)
    is_going, may_go, is_refused = (threading.Event() for _ in range(3))
    before, sleep = os.pwritev, time.sleep

    def write(*args: Any) -> int:
        is_going.set()
        may_go.wait(30)
        return before(*args)

    monkeypatch.setattr(os, "pwritev", write)
    claims: list[HostTier] = []

    def refuse(seconds: float) -> None:
        if seconds == host_budget.LOOK_SECONDS:
            is_refused.set()
        sleep(seconds)

    monkeypatch.setattr(host_budget.time, "sleep", refuse)

    def claim() -> None:
        claims.append(HostTier.reserve(ours.config, "qwen", PAGE, setting="--size"))

    claimant = threading.Thread(target=claim)
    claimant.start()
    is_going.wait(30)
    stop = moving_out.Doorbell.close

    def close(bell: moving_out.Doorbell) -> None:
        may_go.set()  # it was told to stop before
        stop(bell)
        assert is_refused.wait(30)  # while it is read

    monkeypatch.setattr(moving_out.Doorbell, "close", close)
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    ours.check(NUM_PAGES)
    claimant.join()  # it asked once more, when nobody read it
    assert names(tmp_path / "disk") == [("llama", True)]
    assert list((tmp_path / "disk").glob("*.part")) == []
    ours.weights.hold(0)
    claims.pop().close()
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    ours.check(NUM_PAGES)


def test_who_reads_its_copy_again_and_again_is_not_asked_for_ever(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(HostBackend(PAGE)).start()
    assert offers.is_offered(ours.copy.path)

    def read_on(image: Path) -> str:
        ours.weights.hold(0)
        ours.weights.hold(NUM_PAGES)
        return "" if image == ours.copy.path else "another one"

    monkeypatch.setattr(host_budget, "ask_for", read_on)
    with pytest.raises(HostBudgetError, match="llama is read again and again"):
        make_budget(ours.config, GIB).claim("qwen", PAGE)
    ours.check(NUM_PAGES)


def test_a_sleeper_that_was_killed_is_not_waited_for(make: Make, tmp_path: Path) -> None:
    ours = make(HostBackend(PAGE)).start()
    folder = tmp_path / "weights"

    config = ours.config.model_copy(update={"host_budget": 8 * WHOLE_BYTES})

    def sleep_and_die() -> None:
        copy = open_copy(config, OTHER_KEY, PagedLayout(), make_budget(config, GIB))
        assert copy is not None
        assert copy.fill(Pages.of(2), threading.Event())
        moving_out.MovingOut(SimpleNamespace(copy=copy), lambda _: None, Pins()).offer()
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code_of_child(sleep_and_die) == -signal.SIGKILL
    await_that(lambda: len(list(folder.glob("*.bell"))) == 2)
    assert names(folder) == [("llama", True), ("qwen", False)]
    ours.weights.hold(0)
    claim = make_budget(ours.config, GIB).claim("gemma", PAGE)
    assert names(tmp_path / "disk") == [("llama", True), ("qwen", False)]
    claim.close()
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_a_socket_of_who_was_killed_is_removed(tmp_path: Path) -> None:
    image = tmp_path / f"{KEY.digest}.image"
    image.touch()

    def listen_and_die() -> None:
        moving_out.Doorbell(offers.bell_of(image), lambda: None)
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code_of_child(listen_and_die) == -signal.SIGKILL
    assert offers.is_offered(image)
    assert offers.ask_for(image) == ""
    assert not offers.is_offered(image)


def test_who_never_lets_go_is_said(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = make(HostBackend(PAGE)).start()
    ours.weights.hold(0)
    monkeypatch.setattr(offers, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(offers, "ring", lambda _: True)
    with pytest.raises(HostBudgetError, match="does not let it go"):
        make_budget(ours.config, GIB).claim("qwen", PAGE)


def test_a_rank_that_closes_while_its_copy_is_on_the_disk_leaves_it_there(
    make: Make, tmp_path: Path
) -> None:
    ours = make(HostBackend(PAGE)).start()
    ours.weights.hold(0)
    make_budget(ours.config, GIB).claim("qwen", PAGE).close()
    ours.weights.close()
    assert names(tmp_path / "disk") == [("llama", False)]
    await_that(lambda: not list((tmp_path / "weights").glob("*.bell")))
