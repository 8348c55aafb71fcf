"""Locks: what each engine release has where we hook it, as data beside the code."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from packaging.version import InvalidVersion, Version

from kvcached_patches.check import check_hooks, choose_targets, compare, describe_hooks
from kvcached_patches.hook import Finding, Hook, candidates
from kvcached_patches.sources import Sources
from kvcached_patches.symbols import Symbol
from kvcached_patches.unchanged import File, describe_files, fits, unchanged_in

FOLDER = Path(__file__).parent / "locks"


@dataclass(frozen=True)
class Lock:
    """One release of one engine.

    Attributes:
        distribution: The package on the index.
        release: Its version, without a local part.
        wheel: The file that was read.
        symbols: What each target is there.
        files: What each file is that may hold one, by module.
        aliases: For each name that is rebound, the other modules that have it under that name.
    """

    distribution: str
    release: str
    wheel: str = ""
    symbols: dict[str, Symbol] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return FOLDER / f"{self.distribution}-{self.release}.json"

    def write(self) -> None:
        """Write it to its file."""
        FOLDER.mkdir(exist_ok=True)
        parts = []
        for name, value in sorted(asdict(self).items()):
            text = json.dumps(value, sort_keys=True)
            if isinstance(value, dict):  # a line for each, so that a change shows as one
                items = (f"  {json.dumps(key)}: {json.dumps(value[key])}" for key in sorted(value))
                text = "{\n" + ",\n".join(items) + "\n }"
            parts.append(f" {json.dumps(name)}: {text}")
        self.path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def read_lock(distribution: str, release: str) -> Lock | None:
    """Return the lock of a release, or None if there is none."""
    path = Lock(distribution, public(release)).path
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    symbols = {
        target: Symbol(known["signature"], tuple(known["decorators"]), known["body"])
        for target, known in values.pop("symbols").items()
    }
    files = {
        module: File(known["digest"], tuple(known["lacks"]))
        for module, known in values.pop("files", {}).items()
    }
    return Lock(**values, symbols=symbols, files=files)


def locked_releases(distribution: str) -> list[str]:
    """Return the releases that have a lock, the oldest first."""
    prefix = f"{distribution}-"
    names = (path.stem.removeprefix(prefix) for path in FOLDER.glob(f"{prefix}[0-9]*.json"))
    return sorted(names, key=order)


def public(release: str) -> str:
    """Return a version without its local part."""
    return release.partition("+")[0]


def order(release: str) -> Version:
    """Return what versions are sorted by; a version that is none comes first."""
    try:
        return Version(public(release))
    except InvalidVersion:
        return Version("0.dev0")


def nearest(distribution: str, release: str) -> str | None:
    """Return the newest locked release that is not newer, else the oldest, else None."""
    releases = locked_releases(distribution)
    older = [known for known in releases if order(known) <= order(release)]
    return older[-1] if older else next(iter(releases), None)


def locked_hooks(hooks: Iterable[Hook], lock: Lock) -> tuple[Hook, ...]:
    """Return `hooks` with their targets in a locked release; nothing of the engine is read.

    What a release may lack, and lacks, is left out.
    """
    chosen = []
    for hook in hooks:
        targets = candidates(hook)
        target = next((name for name in targets if name in lock.symbols), hook.target)
        if hook.is_optional and target not in lock.symbols:
            continue
        decorators = lock.symbols[target].decorators if target in lock.symbols else ()
        chosen.append(replace(hook, target=target, alternatives=(), num_decorators=len(decorators)))
    return tuple(chosen)


def gone_since(
    hooks: Iterable[Hook], distribution: str, release: str, symbols: Iterable[str]
) -> list[Finding]:
    """Return what a release may lack and does, though the nearest locked one has it.

    It may have been renamed: our code would find nothing, and go on without.

    Args:
        hooks: What we hook and use.
        distribution: The release's package.
        release: The release.
        symbols: The targets that it has.
    """
    closest = nearest(distribution, release)
    lock = read_lock(distribution, closest) if closest else None
    if lock is None:
        return []
    optional = {target for hook in hooks if hook.is_optional for target in candidates(hook)}
    gone = sorted(optional & lock.symbols.keys() - set(symbols))
    return [
        Finding(target, f"it is gone, and {closest} has it; was it renamed?") for target in gone
    ]


def examine(
    hooks: Iterable[Hook], distribution: str, release: str, sources: Sources
) -> list[Finding]:
    """Return why `hooks` may not be applied to a release.

    A release is served if it has a lock and is what the lock says it is. Files that are the locked
    ones are not parsed.
    """
    lock = read_lock(distribution, release)
    if lock is None:
        closest = nearest(distribution, release)
        text = f"no lock; the nearest is that of {closest}" if closest else "no lock"
        findings = check_hooks(choose_targets(hooks, sources), sources)
        return [Finding(f"{distribution} {release}", text), *findings]
    is_unchanged = unchanged_in(lock.files, sources)
    hooks = [hook for hook in hooks if not fits(hook, lock.symbols, lock.files, is_unchanged)]
    chosen = choose_targets(hooks, sources)
    findings = check_hooks(chosen, sources)
    found = describe_hooks(chosen, sources)
    known = {finding.target for finding in findings}
    differing = compare(chosen, lock.symbols, found, exactly=False)
    return [*findings, *(one for one in differing if one.target not in known)]


def check_lock(lock: Lock, hooks: Iterable[Hook], sources: Sources) -> list[Finding]:
    """Return where a release differs from its lock in anything at all."""
    hooks = tuple(hooks)
    chosen = choose_targets(hooks, sources)
    found = describe_hooks(chosen, sources)
    files = describe_files(hooks, sources)
    return [
        *check_hooks(chosen, sources),
        *compare(chosen, lock.symbols, found, exactly=True),
        *(
            Finding(module, "the lock has another file; lock again")
            for module in sorted(files.keys() | lock.files.keys())
            if files.get(module) != lock.files.get(module)
        ),
    ]
