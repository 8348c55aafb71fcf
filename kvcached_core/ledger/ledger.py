"""The ledger: one small file in shared memory per device that says who may hold how much.

Every process that shares the device maps the file. A change is made under one lock on the open file
description, which the kernel drops when its holder dies; who only looks takes none. A scheduler has
bytes *promised* before it counts on them; the worker turns the promise into *resident* bytes when
it maps them. Rows of dead owners are reaped: the memory itself went back with their processes.

Layers, each in its file: the rows of one process (`store`), coming in (`entry`), on it who is in
the ledger (`members`), promises (`promises`) and weights (`weights`), and here asking and being
asked.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from os import SEEK_END, lseek
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file import (
    ASKED,
    FILE_BYTES,
    HEADER_WORDS,
    MAGIC,
    NO_LIMIT,
    NOTICES,
    NUM_ASKED,
    OWED,
    ROW_WORDS,
    Row,
    RowKey,
)
from kvcached_core.ledger.lifetime import Lifetimes
from kvcached_core.ledger.members import LedgerMembers
from kvcached_core.ledger.policy import shares
from kvcached_core.ledger.promises import LedgerPromises
from kvcached_core.ledger.view import DeviceView, read_rows, view_of
from kvcached_core.ledger.weights import LedgerWeights


@dataclass(frozen=True)
class WantedBytes:
    """What others want of an instance, in bytes.

    Attributes:
        asked_bytes: What it shall give back.
        owed_bytes: The part of it for which requests have to stop if nothing else is left.
        num_asked: How often it was asked so far; names the ask that an answer is for.
    """

    asked_bytes: int
    owed_bytes: int
    num_asked: int = 0


class Ledger(LedgerPromises, LedgerWeights, LedgerMembers):
    """An open ledger file. Any thread may call it; a forked child may not.

    Args:
        path: The file; its folder exists (see `ledger_directory`).
        capacity_bytes: What the instances may hold together. The first one to open the file decides
            it; None opens only a file that is there.
        free_bytes: Returns what may be mapped on the device right now, where others than ourselves
            use it too, as on a GPU; None where the capacity is all there is to know. It is never
            called under the lock.

    Raises:
        LedgerError: If the file is missing, is not ours, or says something else.
    """

    def ask(self, row: RowKey, num_bytes: int) -> int:
        """Ask an instance for up to `num_bytes` of its idle and cached bytes; may wait for seconds.

        Returns:
            The bytes by which this raised what it is asked for; ring its bell if not 0.
        """
        try:
            self._enter_patiently()
            found = self._row(row)
            most_bytes = found.resident_bytes - found.weights_bytes - found.used_bytes
            return self._ask(found, min(num_bytes, most_bytes))
        finally:
            self._exit()

    def ask_peers(
        self, row: RowKey, num_bytes: int, *, is_static: bool = False, is_waiting: bool = True
    ) -> list[RowKey]:
        """Ask the other instances for `num_bytes` together (see `policy.shares`).

        What the own limit would refuse anyway, and what is on its way already, is not asked for.
        Who waits asks nobody while the lock is held for too long: it asks again.

        Args:
            row: The row in whose name they are asked.
            num_bytes: What it lacks.
            is_static: Whether it is for what was announced. No limit counts that, and requests
                stop for it only for an instance that wakes: those of lower priorities.
            is_waiting: Whether the instance waits for it, and is told when memory comes. Otherwise
                a command asks once, and may wait for seconds.

        Returns:
            The rows that were asked and have not answered; ring their bells. Who waits asks again
            after a while, so that a ring which nobody heard costs that time and not more.
        """
        try:
            if not is_waiting:
                self._enter_patiently()
            elif not self._enter(is_looking_around=is_static):
                return []
            asker = self._row(row)
            wanted = num_bytes if is_static else min(num_bytes, self._room_below_limit(asker))
            if is_waiting:
                asker.waiting_bytes = max(wanted, 0)
            peers = self._peers(asker)
            coming_bytes = sum(peer.coming_bytes for peer in peers)
            asked = []
            lacking = max(wanted - coming_bytes, 0)
            # Weights that borrowed below a floor could not be given back to its owner.
            for share in shares(
                asker,
                peers,
                lacking,
                is_waiting=is_waiting and not is_static,
                is_static=is_static,
                now_ns=time.time_ns(),
            ):
                peer = self._rows[share.index]
                peer.owed_bytes = max(peer.owed_bytes, share.owed_bytes)
                if not self._ask(peer, share.give_bytes + share.owed_bytes):
                    if not (is_waiting and peer.asked_bytes):
                        continue
                    # It has not answered. Whoever asked first may have ended before it rang, or
                    # the answer waits for the lock; nobody would ring for what is asked already.
                    peer.num_notices += 1
                asked.append(peer.key)
            return asked
        finally:
            self._exit()

    def num_notices(self, row: RowKey) -> int:
        """Return a number that grows whenever there is something new for the instance.

        It takes no lock: an engine looks between every two steps. -1 means that the file or the row
        is not there any more; the next call repairs the one, and is refused for the other.
        """
        number, generation = row
        base, words = HEADER_WORDS + number * ROW_WORDS, self._words
        try:
            is_whole = lseek(self._fd, 0, SEEK_END) >= FILE_BYTES
        except OSError:  # closed, or the parent's
            return -1
        if is_whole and words[0] == MAGIC and words[base] == generation:
            return words[base + NOTICES]
        return -1

    def wanted(self, row: RowKey) -> WantedBytes:
        """Return what others, or its limit, want back from this instance. It takes no lock.

        Raises:
            LedgerError: If the instance has left.
        """
        base = self._look(row)
        if base is None:
            return WantedBytes(0, 0)
        words = self._words
        # First: who asks meanwhile has asked later than what the answer will be for.
        num_asked = words[base + NUM_ASKED]
        excess = self._rows[row.number].excess_bytes
        return WantedBytes(
            max(words[base + ASKED], excess), max(words[base + OWED], excess), num_asked
        )

    def view(self) -> DeviceView:
        """Return a consistent picture of the device, without the dead. It takes no lock.

        Raises:
            LedgerError: If the file was damaged, and nobody made another one.
        """
        device_free_bytes = self._device_free_bytes and self._device_free_bytes()
        found = read_rows(self._fd) if self._is_intact() else None
        if found is None:
            if self._is_removed() and not self.path.exists():
                return DeviceView(self.device, self._capacity_bytes, (), device_free_bytes)
            try:
                self._enter_patiently()  # opens the new file
            finally:
                self._exit()
            found = read_rows(self._fd)
        if found is None:
            raise LedgerError(f"the ledger {self.path} is damaged: it was cut off just now")
        header, rows = found
        lifetimes = self._lifetimes_to_read(header.lifetime_token)
        instances = (
            view_of(row)
            for row in rows
            if row.key in self._own or lifetimes is None or lifetimes.is_held(row.index)
        )
        return DeviceView(self.device, header.capacity_bytes, tuple(instances), device_free_bytes)

    def _lifetimes_to_read(self, token: int) -> Lifetimes | None:
        """Return what tells who lives, or None where nobody can tell."""
        if self._lifetimes is not None and self._lifetimes.token == token:
            return self._lifetimes
        try:
            found = Lifetimes(self.path, is_new_allowed=False)
        except FileNotFoundError:
            return None
        if found.token != token or self._own:
            found.close()
            return None
        if self._lifetimes is not None:
            self._lifetimes.close()
        self._lifetimes = found
        return found

    def _room_below_limit(self, row: Row) -> int:
        limit = row.limit_bytes
        if limit == NO_LIMIT:
            limit = self._header.capacity_bytes
        return limit - row.held_bytes

    def _ask(self, row: Row, num_bytes: int) -> int:
        more = num_bytes - row.asked_bytes
        if more <= 0:
            return 0
        row.asked_bytes += more
        row.num_asked += 1
        row.num_notices += 1
        return more


def sweep(directory: Path) -> None:
    """Remove the ledgers in `directory` that no live instance uses, and damaged ones."""
    for path in directory.glob("*.ledger"):
        with suppress(LedgerError), Ledger(path) as ledger:
            ledger.remove_if_unused()
    for path in directory.glob("*.alive"):
        ledger_path = path.with_suffix(".ledger")
        if not ledger_path.exists():
            # Under a lock: somebody may come just now, who makes the ledger and uses this file.
            with suppress(LedgerError), Ledger(ledger_path, 1) as ledger:
                ledger.remove_if_unused()
    for path in directory.glob("*.damaged-*"):
        path.unlink(missing_ok=True)
