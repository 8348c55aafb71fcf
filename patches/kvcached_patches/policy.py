"""The installed engine, and whether a release of it may be hooked: one check for all adapters."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kvcached_patches.hook import Finding, Hook
from kvcached_patches.locks import examine, locked_hooks, locked_releases, public, read_lock
from kvcached_patches.sources import Folder


@dataclass(frozen=True)
class Installed:
    """An engine in this environment.

    Attributes:
        distribution: Its package on the index.
        release: Its version.
        root: The folder that its package is in.
    """

    distribution: str
    release: str
    root: Path


def find_installed(distributions: Iterable[str], package: str) -> Installed | None:
    """Return the first of `distributions` whose `package` is beside its metadata, or None."""
    for name in distributions:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        root = Path(str(found.locate_file("")))
        if (root / package).is_dir():
            return Installed(name, found.version, root)
    return None


def check_installed(installed: Installed, hooks: Iterable[Hook]) -> list[Finding]:
    """Return why the hooks may not be applied to the installed release."""
    return examine(hooks, installed.distribution, installed.release, Folder(installed.root))


def hooks_of(installed: Installed, hooks: Iterable[Hook]) -> tuple[Hook, ...]:
    """Return the hooks with their targets in the installed release, which was checked."""
    lock = read_lock(installed.distribution, installed.release)
    return tuple(hooks) if lock is None else locked_hooks(hooks, lock)


def report(engine: str, installed: Installed, findings: Iterable[Finding]) -> str:
    """Return what a user is told: engine, release, each finding, and what to do."""
    lines = "".join(f"\n  - {finding}" for finding in findings)
    known = locked_releases(installed.distribution)
    served = f"one of {', '.join(known)}" if known else "a release with a lock"
    return (
        f"{engine} {public(installed.release)} ({installed.distribution}) is not served: {lines}\n"
        f"  install {served}, or set ENABLE_KVCACHED=auto or 0"
    )
