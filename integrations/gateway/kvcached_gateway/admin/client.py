"""Asking a gateway that runs, over its admin socket: what the command line is made of.

It blocks, and needs nothing but the standard library, so that a command starts at once.
"""

import json
import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvcached_core.errors import KVCachedError
from kvcached_gateway.admin.views import ADMIN_SOCKET, About, Decision, DeviceRow, ModelRow

__all__ = ["Client", "GatewayError", "NoGatewayError"]

PATIENCE_SECONDS = 10.0
RELOAD_SECONDS = 60.0  # it reads a file, and looks at each environment
OK = 200


class GatewayError(KVCachedError, RuntimeError):
    """A gateway refuses what it was told, or does not answer; the message says why."""


class NoGatewayError(GatewayError):
    """No gateway serves from this folder."""


class Client:
    """A gateway that serves from a folder.

    Every method raises `NoGatewayError` where none runs, and `GatewayError` with what it answered
    where it refuses.

    Args:
        directory: The folder of the ledgers.
        patience_seconds: How long it may take to answer.
    """

    def __init__(self, directory: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.directory = directory
        self._patience_seconds = patience_seconds

    def about(self) -> About:
        """Return what it is."""
        return About(**self._ask("GET", "/admin/about"))

    def models(self) -> list[ModelRow]:
        """Return its models."""
        return [
            ModelRow(**{**row, "devices": tuple(row["devices"])})
            for row in self._ask("GET", "/admin/models")
        ]

    def devices(self) -> list[DeviceRow]:
        """Return its devices, and the host's memory."""
        return [
            DeviceRow(**{**row, "models": tuple(row["models"])})
            for row in self._ask("GET", "/admin/devices")
        ]

    def decisions(self) -> list[Decision]:
        """Return its last decisions, the oldest first."""
        return [Decision(**row) for row in self._ask("GET", "/admin/decisions")]

    def explain(self, model_id: str) -> str:
        """Return why a model is where it is."""
        return str(self._ask("GET", f"/admin/explain/{quote(model_id, safe='')}")["text"])

    def steer(
        self, model_id: str, verb: str, wait_seconds: float = 0.0
    ) -> tuple[str, ModelRow, bool]:
        """Warm, sleep, stop, pin or unpin a model.

        Returns:
            What it does, in words; the model then; whether it came to rest in that time.
        """
        path = f"/admin/models/{quote(model_id, safe='')}/{verb}?wait={wait_seconds}"
        found = self._ask("POST", path, wait_seconds)
        row = ModelRow(**{**found["model"], "devices": tuple(found["model"]["devices"])})
        return str(found["text"]), row, bool(found["is_settled"])

    def reload(self) -> str:
        """Make it read its file again; return what changed, in words."""
        return str(self._ask("POST", "/admin/reload", RELOAD_SECONDS)["text"])

    def drain(self) -> str:
        """Make it take no new requests and end."""
        return str(self._ask("POST", "/admin/drain")["text"])

    def _ask(self, method: str, path: str, seconds: float = 0.0) -> Any:
        patience_seconds = self._patience_seconds + seconds
        connection = _UnixConnection(self.directory / ADMIN_SOCKET, patience_seconds)
        try:
            connection.request(method, path, headers={"Host": "gateway", "Connection": "close"})
            answer = connection.getresponse()
            status, body = answer.status, answer.read()
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise NoGatewayError(
                f"no gateway serves from {self.directory}; start one with `kvcached serve FILE`, "
                "or say --dir"
            ) from None
        except (OSError, HTTPException) as error:
            raise GatewayError(
                f"the gateway in {self.directory} does not answer: {type(error).__name__}: {error}"
            ) from error
        finally:
            connection.close()
        return _read(status, body)


def _read(status: int, body: bytes) -> Any:
    try:
        found = json.loads(body)
    except ValueError:
        found = {"error": body[:200].decode(errors="replace")}
    if status != OK:
        raise GatewayError(str(found.get("error", found)))
    return found


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("gateway", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's file."""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock = found
        found.settimeout(self.timeout)
        found.connect(str(self._path))
