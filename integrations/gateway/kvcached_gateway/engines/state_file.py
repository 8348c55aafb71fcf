"""What a later gateway needs to adopt the engines of this one, and that only one runs at a time."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from kvcached_core.ledger.opening import ledger_directory
from kvcached_gateway.engines.sessions import Identity
from kvcached_gateway.errors import GatewayRunningError, StateFileError
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.files import write_own

__all__ = ["EngineRecord", "Folder"]

VERSION = 1


@dataclass(frozen=True)
class EngineRecord:
    """One engine that runs.

    Attributes:
        model_id: The model, as in the file of models.
        engine: Which engine it is.
        identity: Its first process.
        address: Where it listens, with its key.
        devices: Where it runs.
        digest: Of what it was started with; another one means that the file has changed.
        instance_name: Its name in the ledger.
        is_elastic: Whether it is in the ledger.
        log: The file that it writes to.
        max_adapters: How many adapters it keeps.
        token: What it answered to the known question.
        start_seconds: What a start of it takes.
        num_starts: How often the model was started.
    """

    model_id: str
    engine: str
    identity: Identity
    address: Address
    devices: tuple[str, ...]
    digest: str
    instance_name: str
    is_elastic: bool
    log: str
    max_adapters: int = 1
    token: str = ""
    start_seconds: float = 0.0
    num_starts: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record of such values.

        Raises:
            TypeError, KeyError: If they are no record.
        """
        return cls(
            **{
                **values,
                "identity": Identity(**values["identity"]),
                "address": Address(**values["address"]),
                "devices": tuple(values["devices"]),
            }
        )


class Folder:
    """The gateway's folder in `KVCACHED_DIR`: its state, its lock, and its engines' files.

    While this object is open, no other gateway of the folder is.

    Args:
        directory: The folder of the ledgers; its owner alone can enter it.

    Attributes:
        path: The folder.
        engines: Where engines' sockets and keys lie.
        logs: Where engines' logs lie.

    Raises:
        GatewayRunningError: If another gateway has it; the message names its process.
        LedgerError: If the folder of the ledgers cannot be made, or is not this user's alone.
    """

    def __init__(self, directory: Path) -> None:
        self.path = ledger_directory(directory) / "gateway"
        self.engines = self.path / "engines"
        self.logs = self.path / "logs"
        for folder in (self.path, self.engines, self.logs):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._file = self.path / "gateway.json"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._lock = os.open(self.path / "gateway.lock", flags, 0o600)
        try:
            # On the open file: the kernel drops it with this process, and no program has it.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise GatewayRunningError(
                f"a gateway with process {pid} serves from {self.path}; stop that one, or set "
                "KVCACHED_DIR to a folder of this one's own"
            ) from error
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another gateway have the folder."""
        os.close(self._lock)

    def read(self) -> list[EngineRecord]:
        """Return the engines of an earlier gateway; none where there is no state.

        Raises:
            StateFileError: If the file is broken. It was set aside, and what it knew is lost.
        """
        try:
            text = self._file.read_bytes()
        except FileNotFoundError:
            return []
        try:
            return _records(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self._file.with_suffix(".broken")
            self._file.rename(aside)
            raise StateFileError(
                f"{self._file} is broken ({type(error).__name__}: {error}); it is {aside} now. "
                "Engines of an earlier gateway that still run are not adopted: see "
                "`kvcached list`, and end them"
            ) from error

    def write(self, engines: Iterable[EngineRecord]) -> None:
        """Write the engines that run now, whole or not at all.

        Raises:
            OSError: If the disk is full, or the folder gone; what was written before stays.
        """
        values = {"version": VERSION, "engines": [each.to_json() for each in engines]}
        write_own(self._file, json.dumps(values, indent=1))


def _records(values: Any) -> list[EngineRecord]:
    if values["version"] != VERSION:
        raise ValueError(f"version {values['version']}, not {VERSION}")
    return [EngineRecord.from_json(each) for each in values["engines"]]
