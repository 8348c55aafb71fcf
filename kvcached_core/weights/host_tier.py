"""An engine's copies of cached blocks beside its device: their room in the host budget, and counts.

The engine's own offloading takes host memory, all of it when it starts. Its claim stands beside
those of the copies of weights, and ends with the engine, however that ends.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from kvcached_core.config import PREFIX, Config
from kvcached_core.errors import HostBudgetError
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.copies_folder import Holder, note_in, read_holders, read_note

HOST, DISK = "host", "disk"
KIND = "tier"
NUM_READS = 3
# How long a start waits for room: weights that come back just now are read in less.
WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class TierCounts:
    """What one tier of an engine did since its start, all ranks together.

    Attributes:
        tier: `HOST` or `DISK`.
        held_bytes: What lies there now; 0 where nobody knows.
        stored_bytes: What was copied to it: from the device, or to a disk from the host.
        loaded_bytes: What was copied from it: to the device, or from a disk to the host.
        num_hits: Requests that found a prefix there; 0 where the engine counts chunks.
        hit_tokens: Tokens that were not computed for it.
        store_seconds: What the copies to it took, added up.
        load_seconds: What the copies from it took, added up.
        num_chunk_hits: Chunks that the engine looked for and found there; 0 where it counts
            requests.
    """

    tier: str
    held_bytes: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    num_hits: int = 0
    hit_tokens: int = 0
    store_seconds: float = 0.0
    load_seconds: float = 0.0
    num_chunk_hits: int = 0


@dataclass(frozen=True)
class DiskTier:
    """A tier on disk of an engine, and how fast the disk has to be for it.

    Attributes:
        folder: Where its files lie.
        computed_bytes_per_second: KV cache that the engine computes in a second of prompts alone,
            at best, on all ranks; 0 before it has computed a long one.
    """

    folder: str
    computed_bytes_per_second: float = 0.0


@dataclass(frozen=True)
class TierView:
    """The tiers of one engine, as others see them.

    Attributes:
        instance: The engine's name.
        reserved_bytes: Host memory that it has for them.
        counts: What each did; empty before the engine said so.
        disks: Those on disk; empty before the engine said so.
    """

    instance: str
    reserved_bytes: int
    counts: tuple[TierCounts, ...] = ()
    disks: tuple[DiskTier, ...] = ()

    @property
    def held_bytes(self) -> int:
        """What lies in all of them."""
        return sum(each.held_bytes for each in self.counts)


Said = TypeVar("Said", TierCounts, DiskTier)


class HostTier:
    """Host memory that an engine's offloading has, until `close` or the end of the process.

    Attributes:
        num_bytes: How much it is.
    """

    def __init__(
        self, config: Config, instance: str, num_bytes: int, setting: str, region: str
    ) -> None:
        self.num_bytes = num_bytes
        try:
            self._claim = make_budget(config).claim(
                f"the offloaded cache of {instance}",
                num_bytes,
                kind=KIND,
                instance=instance,
                leftover=region,
                wait_seconds=WAIT_SECONDS,
            )
        except HostBudgetError as error:
            raise HostBudgetError(
                f"{error}; lower {setting}, raise {PREFIX}HOST_BUDGET, or stop who has it",
                error.needed_bytes,
                error.budget_bytes,
            ) from error

    @classmethod
    def reserve(
        cls, config: Config, instance: str, num_bytes: int, *, setting: str, region: str = ""
    ) -> "HostTier":
        """Reserve host memory in the budget, before the engine allocates it.

        Args:
            config: The settings.
            instance: The engine's name.
            num_bytes: What all of its ranks take together, in bytes.
            setting: The engine's setting that says so, for the message.
            region: The file in which the engine has that memory, if it makes one by a name that is
                no other engine's. It is removed if the engine is killed.

        Raises:
            HostBudgetError: If there is no room; it says who has how much, and what to set.
            HostCopyError: If the folder of claims cannot be used.
        """
        return cls(config, instance, num_bytes, setting, region)

    def note(self, counts: Sequence[TierCounts], disks: Sequence[DiskTier] = ()) -> None:
        """Say what the tiers did, and which lie on disk.

        It is one small write, so once a second is often enough.

        They are for people: where they cannot be written, the engine serves on.
        """
        said: list[TierCounts | DiskTier] = [*counts, *disks]
        text = json.dumps([asdict(each) for each in said])
        with suppress(OSError):
            note_in(self._claim.fd, f"{crc32(text.encode())} {text}\n")

    def close(self) -> None:
        """Give the room back; a second call does nothing."""
        self._claim.close()


def read_tiers(folder: Path) -> list[TierView]:
    """Return the tiers of all engines that live, by their names; nothing is waited for.

    Args:
        folder: That of the copies and claims.
    """
    found = (_view(held) for held in read_holders(folder) if held.kind == KIND)
    return sorted(found, key=lambda view: view.instance)


def _view(held: Holder) -> TierView:
    said: list[dict[str, Any]] = []
    for _ in range(NUM_READS):  # somebody may be writing
        number, _, text = read_note(held.path).partition(" ")
        if number == str(crc32(text.encode())):
            said = json.loads(text)
            break
    counts = tuple(_known(TierCounts, one) for one in said if "tier" in one)
    disks = tuple(_known(DiskTier, one) for one in said if "folder" in one)
    return TierView(held.instance, held.num_bytes, counts, disks)


def _known(kind: type[Said], words: dict[str, Any]) -> Said:
    """Make one of what was said, without what another version says more."""
    return kind(**{field.name: words[field.name] for field in fields(kind) if field.name in words})
