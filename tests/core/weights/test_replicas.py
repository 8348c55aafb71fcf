"""A wake has its pages from a replica as far as one has them, the rest from the host's copy.

The host copy is spoiled where a test has to know that a page came from a replica.
"""

import ctypes
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import replica_ranks
from helpers.backends import LimitedBackend
from helpers.fake_driver import FakeDriver, Result, tensors_on_the_host
from helpers.forked import exit_code_of_child
from helpers.replica_ranks import ReplicaRank
from helpers.waiting import PATIENCE_SECONDS, await_that
from helpers.weight_ranks import NUM_PAGES, PAGE, Recorder

from kvcached_core.errors import BackendError, OutOfMemoryError
from kvcached_core.weights import exporting, fetching, importing, rank_row
from kvcached_core.weights.exporting import Wish, sockets_of
from kvcached_core.weights.importing import Replica, connect
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.mapped_pages import BATCH_PAGES

TESTS = Path(__file__).parents[2]
WORDS = PAGE // 8
Make = Callable[..., ReplicaRank]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded machine changes nothing."""
    monkeypatch.setattr(importing, "ANSWER_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(exporting, "HOLD_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(fetching, "LOOK_PAGES", 4)
    monkeypatch.setattr(exporting, "BATCH_PAGES", 7)
    monkeypatch.setattr(importing, "BATCH_PAGES", 7)


@pytest.fixture(params=["host", "cuda"])
def make(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Make]:
    """Return what makes a rank by its name; each GPU has a driver of its own."""
    tensors_on_the_host(monkeypatch)
    made: list[ReplicaRank] = []

    def make_one(name: str, driver: FakeDriver | None = None, **settings: Any) -> ReplicaRank:
        if request.param == "cuda" and driver is None:
            driver = FakeDriver(granularity_bytes=PAGE)
        made.append(ReplicaRank(tmp_path, name, driver, **settings).start())
        return made[-1]

    yield make_one
    for one in reversed(made):
        one.close()


@pytest.fixture
def pair(make: Make) -> tuple[ReplicaRank, ReplicaRank]:
    """Two ranks with the same weights; the first one's are all given."""
    ours, theirs = make("ours"), make("theirs")
    ours.weights.hold(0)
    ours.done.clear()
    return ours, theirs


def spoil_copy(rank: ReplicaRank) -> None:
    """Let a wake from the host be seen: all ranks share this copy."""
    ctypes.memset(rank.copy.page_address(0), 1, NUM_PAGES * PAGE)


def test_all_pages_come_from_a_replica_and_none_from_the_host(
    pair: tuple[ReplicaRank, ReplicaRank],
) -> None:
    ours, theirs = pair
    spoil_copy(ours)
    for num_pages in (5, NUM_PAGES):
        assert ours.weights.hold(num_pages).num_resident_pages == num_pages
        ours.check(num_pages)
    assert ours.num_from_host == 0
    assert not ours.weights.arriving.is_pending
    theirs.check(NUM_PAGES)


def test_without_the_replica_a_spoiled_copy_is_seen(pair: tuple[ReplicaRank, ReplicaRank]) -> None:
    ours, theirs = pair
    spoil_copy(ours)
    theirs.replicas.close()
    ours.weights.hold(NUM_PAGES)
    with pytest.raises(AssertionError):
        ours.check(NUM_PAGES)


def test_a_wake_continues_from_the_host_where_the_replica_has_no_more(
    pair: tuple[ReplicaRank, ReplicaRank],
) -> None:
    ours, theirs = pair
    theirs.weights.hold(9)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert ours.num_from_host == NUM_PAGES - 9


def test_a_second_replica_has_what_the_first_one_lacks(make: Make) -> None:
    ranks = [make(name) for name in ("one", "two", "three")]
    for ours, num_pages in zip(ranks, (0, 6, 13), strict=True):
        ours.weights.hold(num_pages)
        ours.done.clear()
    ranks[0].weights.hold(NUM_PAGES)
    ranks[0].check(NUM_PAGES)
    # In which order they are asked, nobody knows.
    assert ranks[0].num_from_host == NUM_PAGES - 13


@pytest.mark.parametrize("changed_page", [None, 0, 5, 11])
def test_what_is_mapped_or_still_to_be_mapped_is_counted_at_every_moment(
    pair: tuple[ReplicaRank, ReplicaRank],
    monkeypatch: pytest.MonkeyPatch,
    changed_page: int | None,
) -> None:
    ours, theirs = pair
    if changed_page is not None:
        theirs.change(changed_page * WORDS + 3, -1)
    ours.ledger.describe_weights(ours.row, NUM_PAGES * PAGE)
    ours.ledger.announce(ours.row, NUM_PAGES * PAGE, is_waking=True)
    counted, untold_pages = set[int](), set[int]()
    call = Recorder._call

    def call_and_look(layer: Recorder, verb: str, *rest: Any) -> Any:
        result = call(layer, verb, *rest)
        if layer.verbs is ours.done:
            view = ours.view()
            counted.add((view.weights_bytes + view.static_bytes) // PAGE)
            untold_pages.add(ours.image.num_resident_pages - view.weights_bytes // PAGE)
        return result

    monkeypatch.setattr(Recorder, "_call", call_and_look)
    ours.weights.hold(NUM_PAGES)
    assert counted == {NUM_PAGES}
    assert untold_pages <= set(range(BATCH_PAGES + 1))
    ours.check(NUM_PAGES)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_page_that_has_changed_in_the_replica_comes_from_the_host(
    pair: tuple[ReplicaRank, ReplicaRank], caplog: pytest.LogCaptureFixture, *, is_told: bool
) -> None:
    ours, theirs = pair
    theirs.change(11 * WORDS + 3, -1)
    if is_told:
        theirs.weights.mark_dirty()
    with caplog.at_level(logging.INFO, "kvcached"):
        ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert ours.num_from_host == (NUM_PAGES if is_told else NUM_PAGES - 11)
    assert ("page 11 of a replica has changed" in caplog.text) is not is_told


def test_without_the_look_a_page_that_has_changed_is_taken(
    pair: tuple[ReplicaRank, ReplicaRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    theirs.change(11 * WORDS + 3, -1)
    monkeypatch.setattr(fetching, "_num_right", lambda _looks, wanted: len(wanted))
    ours.weights.hold(NUM_PAGES)
    with pytest.raises(AssertionError):
        ours.check(NUM_PAGES)


def test_an_update_that_the_replica_has_written_back_is_none_of_ours(
    pair: tuple[ReplicaRank, ReplicaRank],
) -> None:
    ours, theirs = pair
    theirs.change(2 * WORDS, 9)
    theirs.weights.hold(0)
    theirs.weights.hold(NUM_PAGES)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    theirs.check(NUM_PAGES)
    assert ours.num_from_host == NUM_PAGES - 2


def test_other_weights_are_no_replica(make: Make) -> None:
    ours, _ = make("ours"), make("other", key=CopyKey("1" * 32, "other"))
    ours.weights.hold(0)
    ours.done.clear()
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert ours.num_from_host == NUM_PAGES


def open_replica(ours: ReplicaRank) -> Replica:
    """Return the other rank's pages, all of which are wanted."""
    folder = ours.config.copies_dir
    (path,) = (path for path in sockets_of(folder, ours.copy.digest) if path != own(ours).path)
    line = connect(path)
    assert line is not None
    sums = ours.copy.known_sums(0, NUM_PAGES)
    return Replica(line, ours.replicas.backend, Wish(ours.copy.digest, PAGE, 0, sums))


def own(rank: ReplicaRank) -> Any:
    return rank.replicas._exporting


def test_no_page_goes_while_one_is_read(
    pair: tuple[ReplicaRank, ReplicaRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    begun, give = threading.Event(), theirs.weights._give_clean

    def give_and_tell(*args: Any) -> None:
        begun.set()
        give(*args)

    monkeypatch.setattr(theirs.weights, "_give_clean", give_and_tell)
    giving = threading.Thread(target=theirs.weights.hold, args=(0,))
    with closing(open_replica(ours)) as replica:
        next(replica.addresses())
        giving.start()
        await_that(lambda: own(theirs)._num_waiting == 1)
        assert not begun.wait(0.2)
        theirs.check(NUM_PAGES)
    giving.join()
    theirs.check(0)


def test_who_reads_too_long_keeps_nobody_waiting_and_reads_on(
    pair: tuple[ReplicaRank, ReplicaRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    monkeypatch.setattr(exporting, "HOLD_SECONDS", 0.5)
    with closing(open_replica(ours)) as replica:
        address = next(replica.addresses())
        theirs.weights.hold(0)
        theirs.check(0)
        assert ctypes.string_at(address, PAGE) == theirs.content[:WORDS].numpy().tobytes()


def test_who_comes_while_another_reads_has_the_copy_of_the_host(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _, third = make("ours"), make("theirs"), make("third")
    third.replicas.close()
    third.weights.hold(0)
    third.done.clear()
    with closing(open_replica(ours)) as replica:
        next(replica.addresses())
        own(ours).close()
        monkeypatch.setattr(importing, "ANSWER_SECONDS", 0.05)
        third.weights.hold(NUM_PAGES)
    third.check(NUM_PAGES)
    assert third.num_from_host == NUM_PAGES


def test_a_replica_that_ends_in_the_middle_leaves_what_was_imported(
    pair: tuple[ReplicaRank, ReplicaRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    real, num_mapped = Replica._map, 0

    def end_after_five(replica: Replica, fd: int) -> int:
        nonlocal num_mapped
        num_mapped += 1
        if num_mapped == 5:
            theirs.close()
        return real(replica, fd)

    monkeypatch.setattr(Replica, "_map", end_after_five)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert ours.num_from_host == NUM_PAGES - 7  # the first batch was on its way


def test_a_replica_that_does_not_answer_or_talks_nonsense_is_left(
    pair: tuple[ReplicaRank, ReplicaRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    theirs.replicas.close()
    path = ours.config.copies_dir / f"{'0' * 12}-silent{exporting.SOCKET}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(path))
        silent.listen()
        monkeypatch.setattr(importing, "ANSWER_SECONDS", 0.05)
        ours.weights.hold(5)
        line, _ = silent.accept()
        assert Wish.of(line.recv(1 << 16)).first == 0
        line.close()
    ours.weights.hold(NUM_PAGES)  # nobody listens there now
    assert not path.exists()
    ours.check(NUM_PAGES)
    assert ours.num_from_host == NUM_PAGES


WORDS_OF_NOBODY = [
    b"nonsense",
    b"[]",
    b'{"digest": "' + b"0" * 32 + b'", "page_bytes": 65536, "first": -1, "sums": [[0, 0]]}',
    b'{"digest": "' + b"0" * 32 + b'", "page_bytes": 65536, "first": 99, "sums": [[0, 0]]}',
    b'{"digest": "' + b"0" * 32 + b'", "page_bytes": 4096, "first": 0, "sums": [[0, 0]]}',
    b'{"digest": "' + b"1" * 32 + b'", "page_bytes": 65536, "first": 0, "sums": [[0, 0]]}',
]


@pytest.mark.parametrize("message", WORDS_OF_NOBODY)
def test_who_asks_for_something_else_gets_nothing_and_the_next_one_all(
    pair: tuple[ReplicaRank, ReplicaRank], message: bytes
) -> None:
    ours, theirs = pair
    line = connect(own(theirs).path)
    assert line is not None
    line.send(message)
    _, fds, _, _ = socket.recv_fds(line, 16, 16)
    assert not fds
    line.close()
    ours.weights.hold(NUM_PAGES)
    assert ours.num_from_host == 0
    ours.check(NUM_PAGES)


def test_who_cannot_be_answered_leaves_the_next_one_all(
    pair: tuple[ReplicaRank, ReplicaRank], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pair
    exporting = own(theirs)
    find = exporting._find

    def fail(_wish: Wish) -> Any:
        raise KeyError("planted")

    exporting._find = fail
    line = connect(exporting.path)
    assert line is not None
    line.send(Wish(ours.copy.digest, PAGE, 0, ours.copy.known_sums(0, 1)).to_bytes())
    assert line.recv(16) == b""  # it hangs up
    line.close()
    exporting._find = find
    assert "weights are not read on" in caplog.text
    ours.weights.hold(NUM_PAGES)
    assert ours.num_from_host == 0
    ours.check(NUM_PAGES)


def test_nothing_stays_open(make: Make) -> None:
    ours, _ = make("ours"), make("theirs")
    before = num_descriptors()
    for _ in range(2):
        ours.weights.hold(0)
        ours.weights.hold(NUM_PAGES)
    await_that(lambda: num_descriptors() == before)


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_socket_goes_with_the_rank_and_no_child_keeps_it(make: Make) -> None:
    theirs = make("theirs")
    path = own(theirs).path
    assert path.stat().st_mode & 0o777 == 0o600
    assert exit_code_of_child(theirs.weights.close) == 0
    assert path.exists()
    line = connect(path)
    assert line is not None
    line.close()
    theirs.weights.close()
    assert not path.exists()


def make_limited(make: Make) -> tuple[ReplicaRank, LimitedBackend]:
    """Return a rank on a device of which a test says how much memory it has; at first enough."""
    limits: list[LimitedBackend] = []

    def limited(inner: Any) -> LimitedBackend:
        limits.append(LimitedBackend(inner, NUM_PAGES * PAGE))
        return limits[-1]

    return make("ours", layer=limited), limits[0]


def test_memory_that_ends_in_the_middle_leaves_the_pages_that_came(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_row, "PATIENCE_SECONDS", 0.02)
    ours, limit = make_limited(make)
    make("theirs")
    ours.weights.hold(0)
    ours.done.clear()
    limit.limit_bytes = 10 * PAGE
    assert ours.weights.hold(NUM_PAGES).num_resident_pages == 10
    ours.check(10)
    limit.limit_bytes = NUM_PAGES * PAGE
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert ours.num_from_host == 0


@pytest.mark.parametrize("is_copy_lost", [True, False])
def test_wrong_pages_go_where_the_right_ones_cannot_come(
    make: Make, monkeypatch: pytest.MonkeyPatch, *, is_copy_lost: bool
) -> None:
    monkeypatch.setattr(rank_row, "PATIENCE_SECONDS", 0.02)
    ours, limit = make_limited(make)
    theirs = make("theirs")
    ours.weights.hold(0)
    theirs.change(5 * WORDS, -1)
    with pytest.MonkeyPatch.context() as patch:
        if is_copy_lost:
            patch.setattr(ours.weights._moving_out, "back", lambda: None)
        else:
            limit.limit_bytes = 10 * PAGE
        assert ours.weights.hold(NUM_PAGES).num_resident_pages == 5
        ours.check(5)
    limit.limit_bytes = NUM_PAGES * PAGE
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_pages_that_nobody_can_look_at_come_from_the_host(
    pair: tuple[ReplicaRank, ReplicaRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair
    source = ours.weights.copying.source
    real = source.begin_sums

    def full(first: int, num_pages: int) -> Any:
        if first >= 8:
            raise OutOfMemoryError("look at pages", "no memory", 0)
        return real(first, num_pages)

    monkeypatch.setattr(source, "begin_sums", full)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert ours.num_from_host == NUM_PAGES - 8


CALLS = [
    ("ours", "cuMemImportFromShareableHandle"),
    ("ours", "cuMemCreate"),
    ("ours", "cuMemMap"),
    ("ours", "cuMemSetAccess"),
    ("ours", "cuMemcpyAsync"),
    ("ours", "cuEventRecord"),
    ("ours", "cuStreamWaitEvent"),
    ("ours", "cuEventSynchronize"),
    ("theirs", "cuMemExportToShareableHandle"),
    ("theirs", "cuEventSynchronize"),
]


@pytest.mark.parametrize("make", ["cuda"], indirect=True)
@pytest.mark.parametrize("number", [0, 9])
@pytest.mark.parametrize(("side", "name"), CALLS)
def test_a_failure_at_any_call_leaves_pages_that_are_right_and_a_ledger_that_knows_it(
    make: Make, side: str, name: str, number: int
) -> None:
    drivers = {one: FakeDriver(granularity_bytes=PAGE) for one in ("ours", "theirs")}
    ours, theirs = (make(one, driver) for one, driver in drivers.items())
    ours.weights.hold(0)
    driver = drivers[side]
    first = driver.calls[name]

    def fails(called: str, count: int) -> Any:
        is_this = (called, count) == (name, first + number)
        return Result.CUDA_ERROR_NOT_SUPPORTED if is_this else None

    driver.fails = fails
    try:
        ours.weights.hold(NUM_PAGES)
    except BackendError as error:
        assert error.call == name  # noqa: PT017  most of them are made good from the host
    num_there = ours.weights.status().num_resident_pages
    num_words = num_there * WORDS
    drivers["ours"].fails = lambda _name, _number: None
    ours.image.backend.finish_copies()
    assert ours.words(num_there).equal(ours.content[:num_words])
    assert ours.view().weights_bytes == ours.image.num_resident_pages * PAGE
    assert drivers["ours"].created_bytes == ours.view().weights_bytes
    drivers["theirs"].fails = lambda _name, _number: None
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    theirs.check(NUM_PAGES)
    assert drivers["ours"].num_imported == 0


@pytest.mark.parametrize("make", ["cuda"], indirect=True)
def test_a_replica_on_a_device_without_access_is_none(make: Make) -> None:
    driver = FakeDriver(granularity_bytes=PAGE)
    ours, _ = make("ours", driver), make("theirs")
    ours.weights.hold(0)
    ours.done.clear()
    driver.has_peer_access = False
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert (ours.num_from_host, driver.num_imported) == (NUM_PAGES, 0)


@pytest.mark.parametrize("make", ["cuda"], indirect=True)
def test_what_was_imported_outlives_the_kill_of_its_owner(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make("ours")
    ours.weights.hold(0)
    ours.done.clear()
    words = [sys.executable, replica_ranks.__file__, str(tmp_path)]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as theirs:
        assert theirs.stdout is not None
        assert theirs.stdout.readline().strip() == replica_ranks.READY
        real, num_mapped = Replica._map, 0

        def kill_after_three(replica: Replica, fd: int) -> int:
            nonlocal num_mapped
            num_mapped += 1
            if num_mapped == 3:
                theirs.kill()
                theirs.wait()
            return real(replica, fd)

        monkeypatch.setattr(Replica, "_map", kill_after_three)
        ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    assert ours.num_from_host == NUM_PAGES - 7
