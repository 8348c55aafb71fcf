"""What `kvcached doctor` looks at: folder, ledgers, settings, driver, engines."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from kvcached_core import __version__, nvml
from kvcached_core.errors import BackendError, KVCachedError
from kvcached_core.ledger import Ledger
from kvcached_core.ledger_open import ledger_paths
from kvcached_core.units import MIB, format_bytes

# Adapters say here what they find: functions that return pairs of whether it is good, and a text.
GROUP = "kvcached.doctor"
LEAST_SPACE_BYTES = MIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: What it is.
        is_good: Whether it is as it should be.
        text: What was found; where it is not good, with what to do.
    """

    what: str
    is_good: bool
    text: str


def examine(directory: Path) -> list[Finding]:
    """Return everything there is to say about this machine and environment."""
    folder = _folder(directory)
    return [
        _good("kvcached", f"{__version__}, Python {platform.python_version()}"),
        folder,
        *(_ledgers(directory) if folder.is_good else ()),
        _settings(),
        _memory(),
        _driver(),
        *_engines(),
    ]


def _folder(directory: Path) -> Finding:
    try:
        ledger_paths(directory)
        if not directory.exists():
            return _good("folder", f"{directory} is not there yet; the first engine makes it")
    except KVCachedError as error:
        return _bad("folder", str(error))
    free_bytes = shutil.disk_usage(directory).free
    if not os.access(directory, os.W_OK):
        return _bad("folder", f"{directory} is read-only; set KVCACHED_DIR to another")
    if free_bytes < LEAST_SPACE_BYTES:
        return _bad("folder", f"{directory} is full; free some of it")
    return _good("folder", f"{directory}, {format_bytes(free_bytes)} free")


def _ledgers(directory: Path) -> Iterator[Finding]:
    for path in ledger_paths(directory):
        try:
            with Ledger(path) as ledger:
                view = ledger.view()
        except KVCachedError as error:
            yield _bad(path.name, str(error))
            continue
        names = ", ".join(instance.name for instance in view.instances) or "no instance"
        yield _good(path.name, f"{format_bytes(view.capacity_bytes)} shared by {names}")
    for path in sorted(directory.glob("*.damaged-*")):
        yield _bad(path.name, "a damaged ledger that was set aside; remove it")


def _settings() -> Finding:
    from kvcached_core.config import SWITCH, read_config, read_switch

    try:
        switch = read_switch()
        read_config()
    except KVCachedError as error:
        return _bad("settings", str(error))
    return _good("settings", f"{SWITCH}={switch}; every KVCACHED_ variable is allowed")


def _memory() -> Finding:
    from kvcached_core.config import read_config
    from kvcached_core.host_memory import host_memory

    found = host_memory()
    usable = f"{format_bytes(found.usable_bytes)} may be used"
    if found.limited_by is not None:
        usable += (
            f" ({found.limited_by} limits it; the machine has {format_bytes(found.machine_bytes)})"
        )
    try:
        pool_bytes = read_config().host_pool
    except KVCachedError:
        return _good("memory", usable)  # what is wrong with the settings is said there
    if pool_bytes > found.usable_bytes:
        return _bad(
            "memory",
            f"KVCACHED_HOST_POOL={format_bytes(pool_bytes)} is more than the process may use: "
            f"{usable}; the kernel would end engines that fill it, so set it lower",
        )
    return _good("memory", f"{usable}; engines on the host share {format_bytes(pool_bytes)}")


def _driver() -> Finding:
    try:
        version = nvml.driver_version()
    except BackendError as error:
        return _good("GPU", f"none ({error}); engines here share host memory")
    found = (f"{name} ({format_bytes(free_bytes)} free)" for name, free_bytes in nvml.gpus())
    return _good("GPU", f"driver {version}: {', '.join(found)}")


def _engines() -> Iterator[Finding]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        for is_good, text in entry.load()():
            yield Finding(entry.name, is_good, text)


def _good(what: str, text: str) -> Finding:
    return Finding(what, is_good=True, text=text)


def _bad(what: str, text: str) -> Finding:
    return Finding(what, is_good=False, text=text)
