"""What `kvcached doctor` looks at: folder, ledgers, settings, driver, engines."""

import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from kvcached_core import __version__
from kvcached_core.cli.disk_tiers import examine_disks
from kvcached_core.cli.image_disk import examine_image_disk
from kvcached_core.errors import BackendError, KVCachedError, LedgerError
from kvcached_core.ledger import nvml
from kvcached_core.ledger.bell import Doorbell
from kvcached_core.ledger.file import NUM_ROWS, RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.lifetime import own_pid_namespace
from kvcached_core.ledger.opening import WRITABLE, doorbell_path, ledger_paths
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB, format_bytes

# Adapters say here what they find: functions that return pairs of whether it is good, and a text.
GROUP = "kvcached.doctor"
HOST = "host"  # the ledger of host memory
LONGEST_DEVICE = "GPU-00000000-0000-0000-0000-000000000000"


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
        *_copies(directory),
        *(_disk_tiers(directory) if folder.is_good else ()),
        _driver(),
        *_engines(),
    ]


def _disk_tiers(directory: Path) -> Iterator[Finding]:
    return (Finding("disk tier", *found) for found in examine_disks(directory))


def _folder(directory: Path) -> Finding:
    try:
        ledger_paths(directory)
        doorbell_path(directory / f"{LONGEST_DEVICE}.ledger", RowKey(NUM_ROWS - 1, 0))
        _start_beside(directory)
    except KVCachedError as error:
        return _bad("folder", str(error))
    if not directory.exists():
        return _good("folder", f"{directory} is not there yet; the first engine makes it")
    free_bytes = shutil.disk_usage(directory).free
    return _good("folder", f"{directory}, {format_bytes(free_bytes)} free")


def _start_beside(directory: Path) -> None:
    """Do what an engine does when it starts, in a folder beside its ledgers, and remove that.

    Raises:
        KVCachedError: If it cannot start there.
    """
    place = next(folder for folder in (directory, *directory.parents) if folder.exists())
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".doctor-", dir=place)
    except OSError as error:
        verb = "written" if place == directory else "made"
        raise LedgerError(
            f"KVCACHED_DIR={str(directory)!r} cannot be {verb}: {error.strerror}; {WRITABLE}"
        ) from error
    with scratch as name:
        path = Path(name)
        try:
            with Ledger(path / "host.ledger", MIB) as ledger:
                row = ledger.register(name="doctor", engine="none")
                Doorbell(path / "s", lambda: None).close()
                ledger.unregister(row)
        except KVCachedError as error:
            raise LedgerError(str(error).replace(name, str(directory))) from error


def _ledgers(directory: Path) -> Iterator[Finding]:
    for path in ledger_paths(directory):
        try:
            with Ledger(path) as ledger:
                view = ledger.view()
        except KVCachedError as error:
            yield _bad(path.name, str(error))
            continue
        names = ", ".join(_named(instance) for instance in view.instances)
        text = f"{format_bytes(view.capacity_bytes)} shared by {names or 'no instance'}"
        if names and path.stem == HOST:
            text += _other_pool(view.capacity_bytes)
        yield _good(path.name, text)
    for path in sorted(directory.glob("*.damaged-*")):
        yield _bad(path.name, "a damaged ledger that was set aside; remove it")


def _named(instance: InstanceView) -> str:
    """Return an instance's name, and that it is a program, or its process id is not of here."""
    if instance.is_program:
        return f"{instance.name} (a program)"
    is_here = instance.pid_namespace in (0, own_pid_namespace())
    return instance.name if is_here else f"{instance.name} (in another PID namespace)"


def _other_pool(capacity_bytes: int) -> str:
    from kvcached_core.config import read_config
    from kvcached_core.memory.host_memory import host_memory

    with suppress(KVCachedError):  # what is wrong with the settings is said there
        own_bytes = read_config().host_pool_bytes(host_memory().usable_bytes)
        if own_bytes != capacity_bytes:
            return (
                f"; the settings here say {format_bytes(own_bytes)}, so an engine that is started "
                f"beside them needs KVCACHED_HOST_POOL={capacity_bytes}"
            )
    return ""


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
    from kvcached_core.memory.host_memory import host_memory

    found = host_memory()
    usable = f"{format_bytes(found.usable_bytes)} may be used"
    if found.limited_by is not None:
        usable += (
            f" ({found.limited_by} limits it; the machine has {format_bytes(found.machine_bytes)})"
        )
    try:
        config = read_config()
        pool_bytes = config.host_pool_bytes(found.usable_bytes)
        budget_bytes = config.host_budget_bytes(found.usable_bytes)
    except KVCachedError:
        return _good("memory", usable)  # what is wrong with the settings is said there
    if pool_bytes > found.usable_bytes:
        return _bad(
            "memory",
            f"KVCACHED_HOST_POOL={format_bytes(pool_bytes)} is more than the process may use: "
            f"{usable}; the kernel would end engines that fill it, so set it lower",
        )
    text = f"{usable}; engines on the host share {format_bytes(pool_bytes)}"
    if pool_bytes + budget_bytes > found.usable_bytes:
        text += (
            f", and copies of weights and offloaded caches may take {format_bytes(budget_bytes)} "
            "more: where both are used, lower KVCACHED_HOST_POOL or KVCACHED_HOST_BUDGET"
        )
    return _good("memory", text)


def _copies(directory: Path) -> Iterator[Finding]:
    """Say what copies of weights in host memory would find."""
    from kvcached_core.config import WeightsMode, read_config
    from kvcached_core.weights.survey import memory_nodes, pinnable_bytes, survey_copies

    try:
        config = read_config().model_copy(update={"dir": directory})
    except KVCachedError:
        return  # what is wrong with the settings is said there
    try:
        found = survey_copies(config)
    except KVCachedError as error:
        yield Finding("host copies", config.weights is WeightsMode.KEEP, str(error))
        return
    text = f"{found.folder}, {format_bytes(found.room_bytes)} free"
    if not found.is_there:
        text += "; the first engine that copies its weights makes it"
    if not found.is_in_memory:
        text += f"; it is on {found.file_system}: a folder in memory serves faster"
    if found.missing_bytes:
        text += (
            f"; that is {format_bytes(found.missing_bytes)} less than the budget allows, and what "
            "does not fit is kept by each process for itself (Docker: raise --shm-size)"
        )
    yield _good("host copies", text)
    names = ", ".join(
        f"{holder.name} {format_bytes(holder.num_bytes)}{'' if holder.is_used else ' (unused)'}"
        for holder in found.holders
    )
    held = f"{format_bytes(found.held_bytes)} of {format_bytes(found.budget_bytes)} in use"
    yield _good("host budget", f"{held}: {names}" if names else held)
    if config.weights_disk is not None:
        yield Finding("image disk", *examine_image_disk(config.weights_disk, config))
    num_bytes = pinnable_bytes()
    yield _good(
        "pinning",
        "no limit of locked memory"
        if num_bytes is None
        else f"{format_bytes(num_bytes)} of memory may be locked (`ulimit -l`); if an engine says "
        "that its host copy cannot be page-locked, raise it (Docker: --ulimit memlock=-1)",
    )
    nodes = memory_nodes()
    if len(nodes) > 1:
        which = ", ".join(f"{node} with CPUs {cpus}" for node, cpus in nodes.items())
        yield _good(
            "NUMA", f"nodes {which}; run an engine on the node of its GPU (`nvidia-smi topo -m`)"
        )


def _driver() -> Finding:
    try:
        version = nvml.driver_version()
    except BackendError as error:
        return _good("GPU", f"none ({error}); engines here share host memory")
    found = (f"{name} ({format_bytes(free_bytes)} free)" for name, free_bytes in nvml.gpus())
    return _good("GPU", f"driver {version}: {', '.join(found)}")


def _engines() -> Iterator[Finding]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            found = list(entry.load()())
        except Exception as error:  # noqa: BLE001  another package's: one that fails hides no other
            found = [(False, f"{entry.value} fails: {type(error).__name__}: {error}")]
        for is_good, text in found:
            yield Finding(entry.name, is_good, text)


def _good(what: str, text: str) -> Finding:
    return Finding(what, is_good=True, text=text)


def _bad(what: str, text: str) -> Finding:
    return Finding(what, is_good=False, text=text)
