"""What needs no look: hooks into files that are, byte for byte, those of the locked release.

What parsing such a file would show stands in the lock. So an engine that is what its lock says
starts without the second or two that its syntax trees take.
"""

import ast
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kvcached_patches.hook import Hook, candidates, module_of
from kvcached_patches.sources import Sources
from kvcached_patches.symbols import DIGITS, Symbol, find, parameters_of


@dataclass(frozen=True)
class File:
    """One file of a release.

    Attributes:
        digest: The start of the SHA-256 of its bytes; empty where the release has no such file.
        lacks: The names that were looked for in it, and are not there.
    """

    digest: str = ""
    lacks: tuple[str, ...] = ()


def digest_of(source: bytes | None) -> str:
    """Return what a file is told apart by; nothing for one that is not there."""
    return "" if source is None else hashlib.sha256(source).hexdigest()[:DIGITS]


def describe_files(hooks: Iterable[Hook], sources: Sources) -> dict[str, File]:
    """Return what is known of each file that may hold a target, for a lock, by module."""
    lacking: dict[str, set[str]] = {}
    for hook in hooks:
        for target in candidates(hook):
            names = lacking.setdefault(module_of(target), set())
            tree, path = sources.tree(module_of(target)), target.partition(":")[2]
            if tree is not None and isinstance(find(tree, path.split(".")), str):
                names.add(path)
    return {
        module: File(digest_of(sources.read(module)), tuple(sorted(names)))
        for module, names in lacking.items()
    }


def unchanged_in(files: Mapping[str, File], sources: Sources) -> Callable[[str], bool]:
    """Return what says of a module whether its file is the locked one; each is read once."""
    known: dict[str, bool] = {}

    def is_unchanged(module: str) -> bool:
        if module not in known:
            locked = files.get(module)
            known[module] = locked is not None and locked.digest == digest_of(sources.read(module))
        return known[module]

    return is_unchanged


def fits(
    hook: Hook,
    symbols: Mapping[str, Symbol],
    files: Mapping[str, File],
    is_unchanged: Callable[[str], bool],
) -> bool:
    """Return whether a lock alone shows that a hook fits; where it does not, somebody has to look.

    Args:
        hook: The hook.
        symbols: What the lock says of targets.
        files: What it says of files.
        is_unchanged: Whether the file of a module is the locked one.
    """
    for target in candidates(hook):
        module, _, path = target.partition(":")
        if not is_unchanged(module):
            return False
        if target in symbols:
            return _has_parameters(hook, symbols[target])
        if files[module].digest and path not in files[module].lacks:
            return False
    return hook.is_optional


def _has_parameters(hook: Hook, symbol: Symbol) -> bool:
    if not hook.parameters:
        return True
    if not symbol.signature.startswith("("):
        return False
    (function,) = ast.parse(f"def _{symbol.signature}: ...").body
    return (parameters_of(function) or set()).issuperset(hook.parameters)
