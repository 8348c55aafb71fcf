"""What copies of blocks are open is told by SGLang's controller; their pages stay until the end."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import NoCache, hooked, let_schedule, make_allocator, make_engine, tell

from kvcached_core import control
from kvcached_core.errors import UnmappedBlockError
from kvcached_core.units import MIB
from kvcached_sglang.hooks import get_new_batch_prefill, process_input_requests
from kvcached_sglang.open_copies import OpenCopies
from kvcached_sglang.transfer_hooks import process_batch_result

pytestmark = pytest.mark.sglang

TOKEN_BYTES = 7
NUM_RANKS = 2


class Event:
    """The end of a copy, which somebody may wait for."""

    def __init__(self) -> None:
        self.is_awaited = False

    def synchronize(self) -> None:
        self.is_awaited = True


class Controller:
    """What of SGLang's controller is read: queues, and acknowledgements in the order of copies."""

    def __init__(self) -> None:
        self.write_queue: list[Any] = []
        self.load_queue: list[Any] = []
        self.ack_write_queue: list[Any] = []
        self.ack_load_queue: list[Any] = []
        self.storage_backend: Any = None
        self.mem_pool_host = SimpleNamespace(
            size_per_token=TOKEN_BYTES, size=100, available_size=lambda: 90
        )

    def start_writing(self) -> None:
        self._start(self.write_queue, self.ack_write_queue)

    def start_loading(self) -> int:
        self._start(self.load_queue, self.ack_load_queue)
        return 3

    @staticmethod
    def _start(queue: list[Any], acknowledgements: list[Any]) -> None:
        if queue:
            acknowledgements.append(SimpleNamespace(finish_event=Event()))
            queue.clear()


def with_draft(controller: Controller) -> int:
    """Give a controller the host pools of SGLang with drafts; return a token's bytes in both."""
    keys, draft = controller.mem_pool_host, SimpleNamespace(size_per_token=2, size=100)
    other = SimpleNamespace(size_per_token=5, size=30, available_size=lambda: 28)  # rows of its own
    pools = {"kv": keys, "draft": draft, "swa": other}
    entries = [SimpleNamespace(name=name, host_pool=pool) for name, pool in pools.items()]
    controller.mem_pool_host = SimpleNamespace(anchor_entry=entries[0], entries=entries)
    return TOKEN_BYTES + draft.size_per_token


class Tier:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.token_bytes, self.folders = 0.0, ()
        self.num_computed: list[int] = []

    def grow(self, num_bytes: int) -> None:
        self.log.append(("grow", num_bytes))

    def computed(self, num_tokens: int) -> None:
        self.num_computed.append(num_tokens)

    def hit(self, num_tokens: int) -> None:
        self.log.append(("hit", num_tokens))

    def stored(self, num_bytes: int, seconds: float) -> None:
        self.log.append(("stored", num_bytes, seconds))

    def loaded(self, num_bytes: int, seconds: float) -> None:
        self.log.append(("loaded", num_bytes, seconds))

    def tell(self, *, is_last: bool, held_bytes: int) -> None:
        self.log.append(("tell", is_last, held_bytes))

    def reset(self) -> None:
        self.log.append("reset")

    def close(self) -> None:
        self.log.append("close")


class Offloading:
    """SGLang's allocator over our pages, and a controller that copies what a test says."""

    def __init__(self, directory: Path, num_ranks: int) -> None:
        self.engine = make_engine(
            directory, host_pool=32 * MIB, page_bytes=2 * MIB, max_spare_pages=0
        )
        self.allocator = make_allocator(self.engine, 1000)
        self.controller, self.tier, self.now = Controller(), Tier(), 5.0
        tier: Any = self.tier
        ranks = self.engine.ranks
        ranks.is_one_of_many = num_ranks > 1
        ranks._gather = lambda values: [values] * num_ranks
        self.copies = OpenCopies(self.engine, tier, lambda: self.now)
        self.copies.meet(self.controller)
        self.engine.port.copies = self.engine.copies = self.copies
        let_schedule(self.engine, NoCache())

    @property
    def num_open_pages(self) -> int:
        return self.engine.pools[0].num_open_pages

    def alloc(self, num_pages: int) -> torch.Tensor:
        num_tokens = num_pages * self.engine.pools[0].geometry.blocks_per_page
        tokens: torch.Tensor = self.allocator.alloc(num_tokens)
        return tokens

    def store(self, tokens: torch.Tensor) -> None:
        self.controller.write_queue.append(SimpleNamespace(device_indices=tokens))
        self.copies.store(self.controller, self.controller.start_writing)

    def load(self, tokens: torch.Tensor, start: Callable[[], Any] | None = None) -> Any:
        operation = SimpleNamespace(device_indices=tokens, host_indices=tokens)
        self.controller.load_queue.append(operation)
        return self.copies.load(self.controller, start or self.controller.start_loading)


@pytest.fixture(params=[NUM_RANKS])
def offloading(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Offloading]:
    made = Offloading(tmp_path, request.param)
    yield made
    made.allocator.get_kvcache().k_buffer.clear()
    made.allocator.get_kvcache().v_buffer.clear()
    assert made.engine.memory is not None
    made.engine.memory.close()
    made.engine.close()


def test_a_page_that_is_copied_goes_only_when_the_copy_is_acknowledged(
    offloading: Offloading,
) -> None:
    tokens = offloading.alloc(3)
    tell(offloading.engine)
    offloading.store(tokens[-1:])
    offloading.allocator.free(tokens)  # as if no node were locked
    num_before = offloading.num_open_pages
    assert offloading.engine.giving.close(9) == num_before - 2  # page 0, and the one that is held
    offloading.copies.settle()
    assert offloading.engine.giving.close(9) == 0
    offloading.controller.ack_write_queue.clear()
    offloading.copies.settle()
    assert offloading.engine.giving.close(9) == 1
    assert not offloading.engine.holds


def test_who_asks_may_count_on_what_is_locked_for_a_copy(offloading: Offloading) -> None:
    tokens = offloading.alloc(3)
    tell(offloading.engine)
    num_open = offloading.num_open_pages
    assert offloading.engine._count_pages() == (num_open, 0)
    offloading.store(tokens)
    assert offloading.engine._count_pages() == (1, num_open - 1)  # page 0 has the padding block
    offloading.store(tokens)  # of a node that two copies name no token counts twice
    assert offloading.engine._count_pages() == (1, num_open - 1)
    offloading.controller.ack_write_queue.clear()
    offloading.copies.settle()
    assert offloading.engine._count_pages() == (num_open, 0)


def test_a_prompt_counts_as_locked_while_the_copy_of_its_answer_is_open(
    offloading: Offloading,
) -> None:
    tokens = offloading.alloc(1)
    tell(offloading.engine)
    acknowledgements = offloading.controller.ack_write_queue

    def end_first() -> int:
        del acknowledgements[0]
        offloading.copies.settle()
        return offloading.copies.num_locked(0)

    offloading.store(tokens[:20])  # a prompt
    offloading.store(tokens[20:23])  # its answer
    assert end_first() == 23
    offloading.store(tokens[30:37])  # what came later is not above it
    assert end_first() == 10
    assert end_first() == 0
    offloading.store(tokens[:20])
    offloading.store(tokens[20:23])
    assert end_first() == 23
    offloading.copies.reset(offloading.controller)
    assert offloading.copies.num_locked(0) == 0


@pytest.mark.parametrize("offloading", [1, NUM_RANKS], indirect=True)
def test_copies_are_acknowledged_while_no_request_may_come_in(
    offloading: Offloading, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    is_alone = request.node.callspec.params["offloading"] == 1
    checks = []
    tree = SimpleNamespace(
        writing_check=lambda: checks.append("stores"), loading_check=lambda: checks.append("loads")
    )
    scheduler = SimpleNamespace(tree_cache=tree)
    monkeypatch.setattr(offloading.engine, "must_hold", lambda: True)
    with hooked(offloading.engine):
        wrapped = get_new_batch_prefill(lambda _self: pytest.fail("a request came in"))
        assert wrapped(scheduler) is None
        # Where all ranks count together what has ended, one that has nothing open comes, too.
        assert checks == ([] if is_alone else ["stores", "loads"])
        checks.clear()
        offloading.store(offloading.alloc(1))
        assert wrapped(scheduler) is None
    assert checks == ["stores", "loads"]


@pytest.mark.parametrize("offloading", [1], indirect=True)  # several look now and then
def test_what_a_copy_kept_goes_when_it_has_ended_though_the_loop_is_paused(
    offloading: Offloading, tmp_path: Path
) -> None:
    engine, controller = offloading.engine, offloading.controller
    tokens = offloading.alloc(3)
    tell(engine)
    offloading.store(tokens)
    scheduler = engine.port.scheduler
    scheduler.tree_cache.writing_check = controller.ack_write_queue.clear
    scheduler.tree_cache.loading_check = lambda: None
    scheduler._engine_paused, scheduler.waiting_queue = True, ["a request that was retracted"]
    offloading.allocator.free(tokens)  # of a request that ended before
    tell(engine)
    control.trim([], directory=tmp_path, wait_seconds=0)
    engine.between_steps()
    assert offloading.num_open_pages == 3 + 1
    with hooked(engine):
        process_input_requests(lambda *_: None)(scheduler, [])
    assert offloading.num_open_pages == 1


def test_what_is_loaded_into_is_mapped_before_the_copy_begins(offloading: Offloading) -> None:
    tokens = offloading.alloc(2)
    memory = offloading.engine.memory
    assert memory is not None
    seen = []

    def start() -> int:
        pages = {int(token) // memory.arena.geometry.ids_per_page for token in tokens}
        seen.extend(memory.arena.is_resident(page) for page in pages)
        return offloading.controller.start_loading()

    assert offloading.load(tokens, start) == 3
    assert len(seen) >= 2
    assert all(seen)


def test_copies_are_counted_when_they_have_ended_on_all_ranks(offloading: Offloading) -> None:
    first, second = offloading.alloc(1), offloading.alloc(1)
    tell(offloading.engine)
    offloading.store(first[:4])
    offloading.now = 6.0
    offloading.load(second[:3])
    assert offloading.engine.port.num_locked_blocks(0) == 4  # what is loaded is a request's
    offloading.now = 8.0
    offloading.controller.ack_load_queue.clear()
    offloading.copies.settle()
    offloading.copies.settle()
    offloading.controller.ack_write_queue.clear()
    offloading.copies.settle()
    each = TOKEN_BYTES * NUM_RANKS
    assert offloading.tier.log == [
        ("hit", 3),
        ("loaded", 3 * each, 2.0),
        ("tell", False, 10 * each),
        ("stored", 4 * each, 3.0),
        ("tell", True, 10 * each),
    ]
    assert not offloading.copies


def test_what_drafts_have_on_the_host_takes_room_and_is_counted(
    offloading: Offloading, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = offloading.alloc(1)
    tell(offloading.engine)
    controller = offloading.controller
    assert not offloading.tier.log
    own = with_draft(controller)
    more = [2 * own, 300]  # what another rank has of a token, and for its drafts
    monkeypatch.setattr(
        offloading.engine.ranks, "_gather", lambda values: [values, more[: len(values)]]
    )
    offloading.copies.meet(controller)
    offloading.store(tokens[:4])
    controller.ack_write_queue.clear()
    offloading.copies.settle()
    assert offloading.tier.log == [
        ("grow", 100 * 2 + 300),
        ("stored", 4 * 3 * own, 0.0),
        ("tell", True, 10 * 3 * own + 3 * 2 * 5),
    ]
    monkeypatch.undo()
    older: Any = Controller()
    older.has_draft, older.mem_pool_host_draft = True, SimpleNamespace(size_per_token=2, size=50)
    offloading.copies.meet(older)
    assert offloading.tier.log[-1] == ("grow", 50 * 2 * NUM_RANKS)


def test_where_a_tier_is_on_disk_is_told_as_it_comes_and_goes(offloading: Offloading) -> None:
    tokens = offloading.alloc(1)
    tell(offloading.engine)
    controller, tier = offloading.controller, offloading.tier
    offloading.store(tokens[:4])
    assert (tier.folders, tier.token_bytes) == ((), TOKEN_BYTES * NUM_RANKS)
    controller.storage_backend = SimpleNamespace(file_path="/nvme/kv")
    offloading.load(tokens[:4])
    assert tier.folders == ("/nvme/kv",)
    controller.storage_backend = SimpleNamespace()  # one that has its own place
    offloading.store(tokens[:4])
    assert tier.folders == ()


def test_prompts_that_were_computed_are_told_and_answers_are_none(offloading: Offloading) -> None:
    def batch(mode: str, *num_tokens: int) -> Any:
        is_extend = mode != "decode"
        mode_of: Any = SimpleNamespace(is_extend=lambda: is_extend)
        return SimpleNamespace(forward_mode=mode_of, extend_lens=list(num_tokens) or None)

    wrapped = process_batch_result(lambda _self, _batch, result: result)
    with hooked(offloading.engine):
        assert wrapped(None, batch("extend", 500, 20), "first") == "first"
        offloading.engine.tier = offloading.tier  # type: ignore[assignment]
        for each in (batch("extend", 500, 20), batch("decode", 3), batch("idle")):
            assert wrapped(None, each, "result") == "result"
    assert offloading.tier.num_computed == [520, 0, 0]
    offloading.engine.tier = None


@pytest.mark.parametrize("offloading", [1, NUM_RANKS], indirect=True)
def test_who_waits_for_copies_begins_those_that_are_queued_and_has_all_acknowledged(
    offloading: Offloading, request: pytest.FixtureRequest
) -> None:
    is_alone = request.node.callspec.params["offloading"] == 1
    controller = offloading.controller
    events = []

    def check(queue: list[Any]) -> Callable[[], None]:
        def checked() -> None:
            assert all(each.finish_event.is_awaited for each in queue)
            events.extend(queue)
            queue.clear()

        return checked

    tree: Any = NoCache()
    tree.cache_controller = controller
    tree.writing_check = check(controller.ack_write_queue)
    tree.loading_check = check(controller.ack_load_queue)
    offloading.engine.port.scheduler.tree_cache = tree
    assert offloading.engine.port.end_copies() is not is_alone  # another rank may have some
    tokens = offloading.alloc(2)
    tell(offloading.engine)
    offloading.store(tokens[:4])
    offloading.load(tokens[-4:])
    controller.write_queue.append(SimpleNamespace(device_indices=tokens[4:6]))
    assert offloading.engine.holds
    assert offloading.engine.port.end_copies()
    assert len(events) == 3  # what was queued, too
    assert not offloading.copies
    assert not offloading.engine.holds


def test_a_reset_waits_for_copies_and_forgets_them(offloading: Offloading) -> None:
    tokens = offloading.alloc(2)
    tell(offloading.engine)
    offloading.store(tokens)
    (open_copy,) = offloading.controller.ack_write_queue
    offloading.copies.reset(offloading.controller)
    assert open_copy.finish_event.is_awaited
    assert not offloading.copies
    assert not offloading.engine.holds
    assert offloading.tier.log == ["reset"]


def test_a_copy_of_what_is_not_mapped_is_refused_where_debugging_is_on(tmp_path: Path) -> None:
    made = Offloading(tmp_path, NUM_RANKS)
    object.__setattr__(made.engine.config, "debug", True)  # it is frozen
    tokens = made.alloc(1)
    with pytest.raises(UnmappedBlockError):
        made.store(tokens)  # its page is mapped when the schedule ends
    tell(made.engine)
    made.store(tokens)
    made.engine.close()


def test_without_a_schedule_there_is_nothing_to_wait_for(offloading: Offloading) -> None:
    offloading.engine.port.scheduler = None
    assert not offloading.engine.port.end_copies()
    offloading.engine.finish_copies()
