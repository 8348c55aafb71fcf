"""Whether an engine is served elastically: decided once, and said in one message.

It is the same for every engine. What arguments and a model's configuration can tell is refused
before anything is sized; what shows later ends the start, because the engine was told sizes of ours
by then.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

from kvcached_core.config import SWITCH, Config, Enable, WeightsMode, read_config, read_switch
from kvcached_core.engine.arrival import Arrival
from kvcached_core.engine.leaving import sweep_at_exit
from kvcached_core.engine.names import safe_name
from kvcached_core.errors import (
    ConfigError,
    FirstRankError,
    GeometryError,
    KVCachedError,
    UnsupportedEngineError,
)
from kvcached_core.memory.devices import Device

# The exit code of a process that has said why it ends, or whose first rank has.
SAID = 78


class Patches(Protocol):
    """What we hook in an engine, and which releases it fits."""

    @property
    def title(self) -> str:
        """The engine's name, as its makers write it."""

    def installed(self) -> Any:
        """Return the release in this environment, with its version as `release`, or None."""

    def misfit(self, found: Any) -> str:
        """Return why a release may not be hooked, or nothing if it may."""

    def apply(self, found: Any, on_misfit: Callable[[Exception], None]) -> Any:
        """Hook a release: all of it or nothing."""


class Startup:
    """How one engine starts in this process, and in those that this one starts.

    Args:
        patches: What we hook in it.
        is_first_rank: Whether this process speaks for all ranks. What every rank finds alike, the
            first one says; the others end with the exit code `SAID`.
    """

    def __init__(self, patches: Patches, is_first_rank: Callable[[], bool] = lambda: True) -> None:
        self.patches = patches
        self.is_first_rank = is_first_rank
        self.logger = logging.getLogger(f"{self._name}.kvcached")  # an engine shows only its own
        self.applied: Any = None

    def start(self) -> None:
        """Check the installed release and hook it, if the switch is on.

        With `ENABLE_KVCACHED=auto` a release that does not fit is served unpatched, with one
        warning, in this process and in those that it starts.

        Raises:
            SystemExit: With a report. Plugin loaders swallow exceptions, but not this one.
        """
        try:
            if read_switch() is Enable.OFF:
                return
            config = read_config()
        except ConfigError as error:
            raise SystemExit(f"kvcached: {error}") from error
        if self.applied is not None:
            return
        found = self.patches.installed()
        release = found.release if found is not None else None
        # Set when the source files were checked already, by a process that this one comes from.
        checked = f"_KVCACHED_{self._name.upper()}_CHECKED"
        if release is None or os.environ.get(checked) != release:
            misfit = self.patches.misfit(found)
            if misfit:
                self.refuse(UnsupportedEngineError(misfit))
                return
        os.environ[checked] = str(release)
        sweep_at_exit(config.dir, config.copies_dir)
        self.applied = self.patches.apply(
            found, lambda error: self.refuse(UnsupportedEngineError(str(error)))
        )

    @property
    def is_on(self) -> bool:
        """Whether this process is hooked, and was not told since to go on without us."""
        return self.applied is not None and read_switch() is not Enable.OFF

    @property
    def engine(self) -> str:
        """The engine and its release, for the ledger."""
        found = self.patches.installed()
        return f"{self._name} {found.release if found is not None else '?'}"

    def arrive(
        self, device: Device, model: object, static_bytes: int, *, may_yield: bool
    ) -> Arrival:
        """Announce what a start of `model` allocates on a device, and have neighbours make room.

        Args:
            device: Where.
            model: Its name or path.
            static_bytes: Bytes of it.
            may_yield: Whether the weights will be offered to neighbours.

        Raises:
            LedgerError: If the ledger cannot be used.
        """
        arrival = Arrival(
            device,
            read_config(),
            name=model_name(model),
            engine=self.engine,
            static_bytes=static_bytes,
            may_yield=may_yield,
        )
        arrival.make_room()
        return arrival

    def serves(self, obstacles: Iterable[str]) -> bool:
        """Return whether a configuration is served; refuse it where it is not, see `refuse`.

        Args:
            obstacles: Why it cannot be served elastically, each with the setting to change.
        """
        try:
            check(obstacles)
        except UnsupportedEngineError as error:
            self.refuse(error)
            return False
        return True

    def may_yield(self, config: Config, obstacles: Iterable[str]) -> bool:
        """Return whether weights are given, too; if they should be and cannot, say why.

        Args:
            config: The settings.
            obstacles: Why they have to stay, each with the setting to change.
        """
        if config.weights is not WeightsMode.YIELD:
            return False
        reasons = list(obstacles)
        if reasons and self.is_first_rank():
            self.logger.warning(
                "kvcached: elastic weights off: %s; elastic KV stays on", "; ".join(reasons)
            )
        return not reasons

    def refuse(self, error: UnsupportedEngineError) -> None:
        """End the process with a report, or say under `auto` that it goes on without us.

        The processes that this one starts go on without us, too.

        Args:
            error: Why the engine cannot be served elastically.

        Raises:
            SystemExit: With the report, or with `SAID` where another rank reports it.
        """
        if read_switch() is not Enable.AUTO:
            self.end(error, error)
        os.environ[SWITCH] = "0"
        if self.is_first_rank():
            self.logger.warning(
                "kvcached is off, %s serves unpatched: %s", self.patches.title, error
            )

    def end(self, reason: object, cause: BaseException | None = None) -> NoReturn:
        """End the process for what every rank finds alike: the first one says so."""
        raise SystemExit(f"kvcached: {reason}" if self.is_first_rank() else SAID) from cause

    @contextlib.contextmanager
    def one_message(self) -> Iterator[None]:
        """End the process with one message where a start fails inside, under `auto` as well.

        For what comes after an engine was told sizes of ours. It cannot go on unpatched any more:
        its own KV cache would take the virtual size, which is about the whole device.

        Raises:
            SystemExit: In the place of every error of ours.
        """
        try:
            yield
        except (GeometryError, UnsupportedEngineError) as error:
            self.end(
                f"{error}\n  {self.patches.title} chose its sizes for elastic pages already, so "
                "ENABLE_KVCACHED=auto cannot go on without them; set ENABLE_KVCACHED=0 for this "
                "model",
                error,
            )
        except ConfigError as error:
            self.end(error, error)
        except KVCachedError as error:  # one rank's own: a ledger, a device
            raise SystemExit(f"kvcached: {error}") from error

    @property
    def _name(self) -> str:
        return self.patches.title.lower()


def check(obstacles: Iterable[str]) -> None:
    """Refuse a configuration that has obstacles.

    Args:
        obstacles: Why it cannot be served elastically, each with the setting to change.

    Raises:
        UnsupportedEngineError: With all of them.
    """
    lines = "".join(f"\n  - {obstacle}" for obstacle in dict.fromkeys(obstacles))
    if lines:
        raise UnsupportedEngineError(
            f"this configuration cannot be served elastically: {lines}\n"
            "  change it, or set ENABLE_KVCACHED=auto or 0"
        )


def model_name(model: object) -> str:
    """Return what an instance is called by default: the last part of its model's name or path."""
    return safe_name(Path(str(model)).name)


def is_first_rank() -> bool:
    """Return whether this process is an engine's only one, or torch's first rank."""
    from torch import distributed  # noqa: PLC0415  an engine that asks has it

    return not distributed.is_initialized() or distributed.get_rank() == 0


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """End the process with one line where what of ours ends a start; the first rank says it.

    For an engine that would log what ends its process. Errors of its own stay what they are.

    Raises:
        SystemExit: With the exit code `SAID`.
    """
    try:
        yield
    except FirstRankError:
        raise SystemExit(SAID) from None
    except KVCachedError as error:
        _say(f"kvcached: {error}")
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        _say(error.code)


def _say(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)  # noqa: T201  the process ends with it
    raise SystemExit(SAID) from None
