"""A router's picture of an engine's prefix cache, made of what vLLM publishes alone."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PATIENCE_MS = 60_000
GPU = "GPU"

Key = tuple[int | None, Any]


class EventMirror:
    """Subscribes to the events of one engine.

    vLLM stores a block twice if two requests compute it at the same time, and tells of each, so
    blocks are counted.

    Args:
        endpoint: Where the publisher is; it need not be there yet.
    """

    def __init__(self, endpoint: str) -> None:
        import msgspec
        import zmq
        from vllm.distributed.kv_events import KVEventBatch

        self.blocks: Counter[Key] = Counter()
        self.num_events: Counter[str] = Counter()
        self._next = 0
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")

    def join(self, publish_nothing: Any) -> None:
        """Have batches of nothing published until one comes through; none is lost from then on."""
        while self._socket.poll(100) == 0:
            publish_nothing()
        _, number, _ = self._socket.recv_multipart()
        self._next = int.from_bytes(number, "big") + 1

    def follow(self, num_published: int) -> None:
        """Apply all batches up to the last one that was published.

        Raises:
            AssertionError: If a batch is missing, or does not come.
        """
        while self._next < num_published:
            assert self._socket.poll(PATIENCE_MS), f"batch {self._next} never came"
            _, number, payload = self._socket.recv_multipart()
            assert int.from_bytes(number, "big") == self._next
            self._next += 1
            self._apply(self._decoder.decode(payload).events)

    def close(self) -> None:
        self._socket.close(linger=0)

    def _apply(self, events: Iterable[Any]) -> None:
        for event in events:
            kind = type(event).__name__
            self.num_events[kind] += 1
            if kind == "AllBlocksCleared":
                self.blocks.clear()
                continue
            assert event.medium == GPU
            keys = [(getattr(event, "group_idx", None), one) for one in event.block_hashes]
            if kind == "BlockStored":
                self.blocks.update(keys)
            else:
                self.blocks.subtract(keys)
                self.blocks += Counter()  # what fell to nothing goes


def cached_blocks(pool: Any) -> "Counter[Key]":
    """Return what a block pool of vLLM's has in its cache, as its events name it."""
    from vllm.v1.core.kv_cache_utils import (
        get_block_hash,
        get_group_id,
        maybe_convert_block_hash,
    )

    found: Counter[Key] = Counter()
    for key, blocks in pool.cached_block_hash_to_block._cache.items():
        name = get_group_id(key), maybe_convert_block_hash(get_block_hash(key))
        found[name] = len(blocks) if isinstance(blocks, dict) else 1
    return found


def endpoint_in(folder: Path) -> str:
    """Return where a publisher binds."""
    return f"ipc://{folder / 'events'}"
