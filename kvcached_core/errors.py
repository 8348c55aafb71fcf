"""Every error of ours: a `KVCachedError` that is also the builtin a caller would expect."""


class KVCachedError(Exception):
    """The base of all errors that kvcached raises on purpose."""


class ConfigError(KVCachedError, ValueError):
    """A setting is wrong; the message names the variable, its value and what is allowed."""


class GeometryError(KVCachedError, ValueError):
    """A KV cache of this shape cannot be laid out in pages."""


class BackendError(KVCachedError, RuntimeError):
    """A call into the memory backend failed.

    Attributes:
        call: The backend's verb, for example `map`.
        code: The operating system's or driver's name of the error.
        needed_bytes: What the call asked for, in bytes.
        available_bytes: What was left, in bytes, or None where nobody knows.
    """

    def __init__(
        self, call: str, code: str, needed_bytes: int, available_bytes: int | None = None
    ) -> None:
        left = "unknown" if available_bytes is None else f"{available_bytes} bytes"
        super().__init__(f"{call} failed: {code}; needed {needed_bytes} bytes, available {left}")
        self.call = call
        self.code = code
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class OutOfMemoryError(BackendError, MemoryError):
    """The backend has no memory left for a page."""


class NoRoomError(KVCachedError, MemoryError):
    """There is no room for what an engine was about to allocate; nothing was allocated."""


class PageStateError(KVCachedError, RuntimeError):
    """A page was mapped twice, or unmapped or copied while it was not mapped."""


class PageKeeperError(KVCachedError, RuntimeError):
    """A thread that maps and unmaps pages has ended; the message and its cause say why."""


class UnmappedBlockError(KVCachedError, LookupError):
    """A step names a block whose page is not mapped."""


class LedgerError(KVCachedError, RuntimeError):
    """The ledger file cannot be used; the message says why and what to do."""


class LedgerBusyError(LedgerError):
    """Somebody holds a ledger's lock and does not go on."""


class NameTakenError(LedgerError):
    """A live instance of the device has this name already."""


class HostCopyError(KVCachedError, RuntimeError):
    """The folder or a file of host copies cannot be used; the message says why and what to do."""


class HostBudgetError(HostCopyError, MemoryError):
    """The host budget has no room; the message names what is needed, the budget, and who holds it.

    Attributes:
        needed_bytes: What was claimed.
        budget_bytes: What all claims together may be.
    """

    def __init__(self, message: str, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class DiskImageError(HostCopyError):
    """An image of weights could not go to the disk; it stays where it was."""


class PolicyError(KVCachedError, ValueError):
    """A limit, floor or priority is refused; the message says why and what is allowed."""


class UnsupportedEngineError(KVCachedError, RuntimeError):
    """This engine release or configuration cannot be served elastically."""


class LayerOrderError(KVCachedError, RuntimeError):
    """A forward ran otherwise than it was seen to run, so its answer cannot be trusted."""


class FirstRankError(KVCachedError):
    """Rank 0 could not enter the server in the ledgers, and has said why."""
