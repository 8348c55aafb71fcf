"""What a router knows of a SGLang server's prefix cache: what the server's KV events say."""

from typing import Any

import msgspec
import zmq

Block = tuple[int | None, int, tuple[int, ...]]


class Mirror:
    """The blocks on the device, by their hashes, as the events say.

    It begins with the first event that says that nothing is cached.

    Attributes:
        num_batches: How many messages came, none of which may be missing.
        num_by_type: How many blocks were stored and removed, and how often all was cleared.

    Args:
        endpoint: Where the server publishes.
    """

    def __init__(self, endpoint: str) -> None:
        self.num_batches = 0
        self.num_by_type = dict.fromkeys(("BlockStored", "BlockRemoved", "AllBlocksCleared"), 0)
        self._next_number: int | None = None
        self._has_begun = False
        self._tokens_of: dict[int, tuple[int, ...]] = {}
        self._hash_after: dict[tuple[int | None, tuple[int, ...]], int] = {}
        self._parent_of: dict[int, int | None] = {}
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)

    def close(self) -> None:
        """Listen no longer."""
        self._socket.close(linger=0)

    @property
    def num_tokens(self) -> int:
        """The tokens that are cached."""
        return sum(map(len, self._tokens_of.values()))

    def listen(self) -> bool:
        """Take in what came since; return whether anything did."""
        has_heard = False
        while self._socket.poll(0):
            _, number, payload = self._socket.recv_multipart()
            self._take(int.from_bytes(number, "big"), msgspec.msgpack.decode(payload))
            has_heard = True
        return has_heard

    def num_found(self, prompt: list[int]) -> int:
        """Return how many tokens of a prompt are cached."""
        parent, start = None, 0
        block_tokens = max(map(len, self._tokens_of.values()), default=1)
        while start < len(prompt):
            tokens = tuple(prompt[start : start + block_tokens])
            found = self._hash_after.get((parent, tokens))
            if found is None:
                break
            parent, start = found, start + len(tokens)
        return start

    def _take(self, number: int, batch: Any) -> None:
        assert self._next_number in (None, number), "an event was lost"
        self._next_number = number + 1
        self.num_batches += 1
        for event in batch[1]:
            self._apply(_named(event))

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self._has_begun = True
            self._tokens_of, self._hash_after, self._parent_of = {}, {}, {}
            self.num_by_type[kind] += 1
        elif self._has_begun and event.get("medium") in (None, "GPU"):
            self.num_by_type[kind] += len(event["block_hashes"])
            (self._store if kind == "BlockStored" else self._remove)(event)

    def _store(self, event: dict[str, Any]) -> None:
        parent, tokens = event["parent_block_hash"], event["token_ids"]
        assert parent is None or parent in self._tokens_of, "a block behind one that is not there"
        for index, block in enumerate(event["block_hashes"]):
            part = tuple(tokens[index * event["block_size"] :][: event["block_size"]])
            self._tokens_of[block], self._parent_of[block] = part, parent
            self._hash_after[parent, part] = block
            parent = block

    def _remove(self, event: dict[str, Any]) -> None:
        for block in event["block_hashes"]:
            tokens = self._tokens_of.pop(block)  # what is not there cannot go
            del self._hash_after[self._parent_of.pop(block), tokens]


def _named(event: Any) -> dict[str, Any]:
    """Return an event by names: older releases send its fields in their order."""
    if isinstance(event, dict):
        return event
    names = {
        "BlockStored": (
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
        ),
        "BlockRemoved": ("block_hashes", "medium"),
        "AllBlocksCleared": (),
    }
    kind, *fields = event
    return {"type": kind} | dict(zip(names[kind], fields, strict=False))
