"""A host tier in the host budget that counts what was copied to it and from it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from kvcached_core.config import Config
from kvcached_core.weights.host_tier import DISK, HOST, DiskTier, HostTier, TierCounts
from kvcached_core.weights.prompt_speed import PromptSpeed

NOTE_SECONDS = 1.0


class CountedTier:
    """The host tier of one engine, and its tiers on disk. The scheduler's thread calls it.

    Attributes:
        folders: Those of its tiers on disk.
        token_bytes: KV cache of one token, in bytes, on all ranks; 0 before that is known.

    Args:
        config: Our settings.
        instance: The engine's name.
        num_bytes: Its size, all ranks together.
        setting: The engine's setting of that, for messages.
        clock: Returns seconds.
        region: The file in which the engine has it, if there is one; see `HostTier.reserve`.

    Raises:
        HostBudgetError: If the host budget has no room for it.
    """

    def __init__(
        self,
        config: Config,
        instance: str,
        num_bytes: int,
        *,
        setting: str,
        clock: Callable[[], float] = time.monotonic,
        region: str = "",
    ) -> None:
        self.folders: Sequence[str] = ()
        self.token_bytes = 0.0
        self._reserve = partial(HostTier.reserve, config, instance, setting=setting, region=region)
        self._tier = self._reserve(num_bytes)
        self._speed = PromptSpeed()
        self._clock = clock
        self._noted_at = 0.0
        self._bytes_at_reset = 0
        self._held_bytes: int | None = None  # where the engine says it
        self._stored_bytes = self._loaded_bytes = 0
        self._store_seconds = self._load_seconds = 0.0
        self._num_hits = self._hit_tokens = 0
        self._disk: TierCounts | None = None  # where the engine says what its disks did

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self._tier.num_bytes

    def grow(self, num_bytes: int) -> None:
        """Take so much more, before anything lies in it.

        Raises:
            HostBudgetError: If the host budget has no room for it.
        """
        self._tier.close()
        self._tier = self._reserve(self._tier.num_bytes + num_bytes)

    def computed(self, num_tokens: int) -> None:
        """Note that a step has ended which computed so many tokens of prompts."""
        if self.folders:
            self._speed.computed(num_tokens, self._clock())

    def hit(self, num_tokens: int) -> None:
        """Note a request that has so many tokens from here."""
        self._num_hits += 1
        self._hit_tokens += num_tokens

    def stored(self, num_bytes: int, seconds: float) -> None:
        """Note a copy to the tier that has ended."""
        self._stored_bytes += num_bytes
        self._store_seconds += seconds

    def loaded(self, num_bytes: int, seconds: float) -> None:
        """Note a copy from the tier that has ended."""
        self._loaded_bytes += num_bytes
        self._load_seconds += seconds

    def moved(self, more: TierCounts) -> None:
        """Note what the tiers on disk did since the last time.

        Args:
            more: Bytes, seconds and chunks; the tokens of what was read are added here.
        """
        was = self._disk or TierCounts(DISK)
        loaded_bytes = was.loaded_bytes + more.loaded_bytes
        self._disk = replace(
            was,
            stored_bytes=was.stored_bytes + more.stored_bytes,
            loaded_bytes=loaded_bytes,
            store_seconds=was.store_seconds + more.store_seconds,
            load_seconds=was.load_seconds + more.load_seconds,
            num_chunk_hits=was.num_chunk_hits + more.num_chunk_hits,
            hit_tokens=int(loaded_bytes / self.token_bytes) if self.token_bytes else 0,
        )

    def tell(self, *, is_last: bool, held_bytes: int | None = None) -> None:
        """Tell others now and then what was done.

        Args:
            is_last: No copy is open, so nothing may follow soon.
            held_bytes: What lies in the tier; None where the engine does not say.
        """
        self._held_bytes = held_bytes
        now = self._clock()
        if is_last or now >= self._noted_at + NOTE_SECONDS:
            self._noted_at = now
            self._note()

    def reset(self) -> None:
        """Note that the tier was emptied."""
        self._bytes_at_reset = self._stored_bytes
        self._held_bytes = None
        self._note()

    @property
    def counts(self) -> TierCounts:
        """What was done since the start. A full tier drops a block for each that it takes."""
        held_bytes = self._held_bytes
        if held_bytes is None:
            held_bytes = min(self._stored_bytes - self._bytes_at_reset, self._tier.num_bytes)
        return TierCounts(
            tier=HOST,
            held_bytes=held_bytes,
            stored_bytes=self._stored_bytes,
            loaded_bytes=self._loaded_bytes,
            num_hits=self._num_hits,
            hit_tokens=self._hit_tokens,
            store_seconds=self._store_seconds,
            load_seconds=self._load_seconds,
        )

    def close(self) -> None:
        """Give the room in the budget back."""
        self._tier.close()

    def _note(self) -> None:
        bytes_per_second = self._speed.tokens_per_second * self.token_bytes
        disks = [DiskTier(folder, bytes_per_second) for folder in self.folders]
        self._tier.note([self.counts, *([self._disk] if self._disk else [])], disks)
