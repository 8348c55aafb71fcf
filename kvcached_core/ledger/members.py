"""Who is in a ledger: taking a row, keeping it alive, giving it back, and what is decided of it."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvcached_core.errors import LedgerError, NameTakenError
from kvcached_core.ledger import file as ledger_file
from kvcached_core.ledger.entry import LedgerEntry
from kvcached_core.ledger.file import NO_LIMIT, Row, RowKey
from kvcached_core.ledger.lifetime import LifetimesReplacedError, own_pid_namespace
from kvcached_core.ledger.nvml import GPU_PREFIXES
from kvcached_core.ledger.opening import set_aside
from kvcached_core.ledger.policy import NO_POLICY, Policy, check, check_longest
from kvcached_core.units import check_name, format_bytes


@dataclass(frozen=True)
class PolicyChange:
    """What `change_policy` did.

    Attributes:
        before: What was decided before.
        after: What is decided now.
        waiting: Who waits for memory, which a lower floor may have freed; ring their bells.
    """

    before: Policy
    after: Policy
    waiting: list[RowKey]


class LedgerMembers(LedgerEntry):
    """A ledger, as who joins it or decides about it sees it: everything here may wait for seconds.

    Args:
        path: The file; its folder exists (see `ledger_directory`).
        capacity_bytes: What the instances may hold together. The first one to open the file decides
            it; None opens only a file that is there.

    Raises:
        LedgerError: If the file is missing, is not ours, or says something else.
    """

    def __init__(self, path: Path, capacity_bytes: int | None = None) -> None:
        super().__init__(path, capacity_bytes)
        try:
            if capacity_bytes is not None:
                while not self._agree_on_capacity():
                    pass  # the file was set aside; the next entry opens the new one
        except BaseException:
            self.close()
            raise

    def register(
        self,
        *,
        name: str,
        engine: str,
        page_bytes: int = 0,
        virtual_bytes: int = 0,
        policy: Policy = NO_POLICY,
        static_bytes: int = 0,
    ) -> RowKey:
        """Take a row for this process and return which it is.

        Args:
            name: The instance's name, which no other live instance of the device has.
            engine: The engine and its release.
            page_bytes: Bytes of a page on all of its ranks here, or 0 while it is not known.
            virtual_bytes: Bytes that the engine believes to have, or 0 while it is not known.
            policy: Limit, floor and priority.
            static_bytes: What it is about to allocate beside its KV cache: nobody else is promised
                these bytes while the row lives.

        Raises:
            NameTakenError: If a live instance has the name.
            LedgerError: If all rows are taken, or the lock is.
            PolicyError: If limit, floor or priority are not allowed.
        """
        check_name(name)
        now_ns = time.time_ns()
        try:
            self._enter_patiently()
            self._reap()
            self._check_capacity()
            for row in self._live_rows():
                if row.name == name:
                    raise NameTakenError(
                        f"an instance named {name!r} (pid {row.pid}) already runs on "
                        f"{self.device}; set KVCACHED_NAME to another name"
                    )
            row = self._free_row()
            row.name, row.engine, row.pid = name, engine, self._pid
            row.pid_namespace = own_pid_namespace()
            self._set_policy(row, policy)
            row.page_bytes, row.virtual_bytes = page_bytes, virtual_bytes
            row.static_bytes = static_bytes
            row.last_used_ns = now_ns
            key = RowKey(row.index, self._header.next_generation)
            self._header.next_generation += 1
            self._header.num_rows = max(self._header.num_rows, row.index + 1)
            self._held_lifetimes().hold(row.index)
            row.generation = key.generation
            self._keep(key, row.base)
            return key
        finally:
            self._exit()

    def join(self, row: RowKey) -> None:
        """Count this process among those whose life keeps the row alive: it will hold memory.

        Raises:
            LedgerError: If the instance has left meanwhile.
        """
        try:
            self._enter_patiently()
            base = self._base(row)
            self._held_lifetimes().hold(row.number)
            self._keep(row, base)
        finally:
            self._exit()

    def unregister(self, row: RowKey) -> list[RowKey]:
        """Give the row back, and with it everything it held.

        Returns:
            The rows that wait for memory; ring their bells.
        """
        try:
            self._enter_patiently()
            leaving = self._row(row)
            self._header.allocated_bytes += leaving.static_bytes
            leaving.clear()
            lifetimes = self._held_lifetimes()
            lifetimes.say_left(row)
            if self._own.pop(row, None) is not None:
                lifetimes.drop(row.number)
            self._unlink_if_unused()
            return self._waiting()
        finally:
            self._exit()

    def describe(
        self,
        row: RowKey,
        *,
        page_bytes: int,
        virtual_bytes: int,
        least_bytes: int = 0,
        token_bytes: int = 0,
    ) -> None:
        """Say how large a page, the whole pool, the largest request and a token are, in bytes.

        Raises:
            PolicyError: If others' floors leave no room for the largest request.
            LedgerError: If the instance has left.
        """
        try:
            self._enter_patiently()
            found = self._row(row)
            floors = {peer.name: peer.floor_bytes for peer in self._peers(found)}
            check_longest(found.name, least_bytes, floors, self._header.capacity_bytes)
            found.page_bytes, found.virtual_bytes = page_bytes, virtual_bytes
            found.least_bytes, found.token_bytes = least_bytes, token_bytes
            self._keep(row, found.base)
        finally:
            self._exit()

    def change_policy(
        self, row: RowKey, *, is_forced: bool = False, **changes: Any
    ) -> PolicyChange:
        """Change what is named of limit, floor and priority; the rest stays as it is now.

        Args:
            row: The instance.
            is_forced: Whether a floor may leave no room for the longest request of another one.
            changes: Attributes of `Policy`.

        Raises:
            PolicyError: If it is not allowed; then nothing is changed.
            LedgerError: If the instance has left.
        """
        try:
            self._enter_patiently()
            found = self._row(row)
            before = _policy(found)
            after = replace(before, **changes)
            self._set_policy(found, after, is_forced=is_forced)
            self._tell(found)
            return PolicyChange(before, after, self._waiting())
        finally:
            self._exit()

    def undo_policy(self, row: RowKey, change: PolicyChange) -> None:
        """Take a change back, except for what somebody changed again since."""
        try:
            self._enter_patiently()
            found = self._row(row)
            now, after, before = _policy(found), vars(change.after), vars(change.before)
            same = {word: before[word] for word, value in vars(now).items() if after[word] == value}
            self._write_policy(found, replace(now, **same))
            self._tell(found)
        finally:
            self._exit()

    def remove_if_unused(self) -> bool:
        """Remove the file if no live instance is in it; return whether it is gone."""
        try:
            self._enter_patiently()
            self._reap()
            return self._unlink_if_unused()
        finally:
            self._exit()

    def _free_row(self) -> Row:
        """Return an empty row that nobody keeps alive, not even a late process."""
        lifetimes = self._held_lifetimes()
        for row in self._rows:
            if not row.is_live and not lifetimes.is_held(row.index):
                row.clear()
                row.limit_bytes = NO_LIMIT
                return row
        raise LedgerError(
            f"all {ledger_file.NUM_ROWS} rows of {self.path} are taken by live instances"
        )

    def _set_policy(self, row: Row, policy: Policy, *, is_forced: bool = False) -> None:
        peers, capacity_bytes = self._peers(row), self._header.capacity_bytes
        check(row, policy, peers, capacity_bytes, is_forced=is_forced)
        self._write_policy(row, policy)

    def _write_policy(self, row: Row, policy: Policy) -> None:
        row.limit_bytes = NO_LIMIT if policy.limit_bytes is None else policy.limit_bytes
        row.floor_bytes, row.priority = policy.floor_bytes, policy.priority

    def _tell(self, row: Row) -> None:
        row.num_notices += 1
        row.num_changes += 1

    def _agree_on_capacity(self) -> bool:
        """Return whether the ledger can be used; False if it was set aside."""
        try:
            self._enter_patiently()
            try:
                self._reap()
            except LifetimesReplacedError as error:
                set_aside(self._fd, self.path, str(error))
                return False
            self._check_capacity()
            return True
        finally:
            self._exit()

    def _check_capacity(self) -> None:
        wanted = self._wanted_capacity
        if wanted is None or wanted == self._header.capacity_bytes:
            return
        if rows := self._live_rows():
            names = ", ".join(f"{row.name!r} (pid {row.pid})" for row in rows)
            is_gpu = self.device.startswith(GPU_PREFIXES)
            raise LedgerError(
                f"this engine wants a pool of {format_bytes(wanted)} on {self.device}, but "
                f"{self.path} has one of {format_bytes(self._header.capacity_bytes)}, in use by "
                f"{names}; give every engine the same "
                f"{'KVCACHED_HEADROOM' if is_gpu else 'KVCACHED_HOST_POOL'}, or set KVCACHED_DIR "
                "to another folder for a pool of its own"
            )
        self._header.capacity_bytes = self._capacity_bytes = wanted


def _policy(row: Row) -> Policy:
    limit = None if row.limit_bytes == NO_LIMIT else row.limit_bytes
    return Policy(limit, row.floor_bytes, row.priority)
