"""The options of each release: whoever locks a release is told which of them are new to it.

An option may allocate memory, or lay it out otherwise, and nothing that we hook is any different.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcached_patches.locks import order, public
from kvcached_patches.sources import Sources

FOLDER = Path(__file__).parent / "options"
NEW, GONE = "new", "gone"


@dataclass(frozen=True)
class Declarations:
    """Where an engine declares its options: annotated names in the bodies of classes.

    Attributes:
        module: What is read first.
        package: Where the modules are that it imports; all classes of these count.
        owner: A class of `module` itself that counts, too.
        has_owners: Whether options of two classes may have one name: each is told with its class.
    """

    module: str
    package: str
    owner: str = ""
    has_owners: bool = False


def options_in(sources: Sources, where: Declarations) -> frozenset[str]:
    """Return the options that an engine declares, from its source files alone."""
    found = set()
    for owner in _classes(sources, where):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name, kind = node.target.id, ast.unparse(node.annotation)
                if not (name.startswith("_") or kind.startswith("ClassVar")):
                    found.add(f"{owner.name}.{name}" if where.has_owners else name)
    return frozenset(found)


def read_options(package: str) -> dict[str, frozenset[str]]:
    """Return the options of each release that is listed, the oldest first."""
    path = FOLDER / f"{package}.json"
    found: dict[str, frozenset[str]] = {}
    names: frozenset[str] = frozenset()
    for release, changes in json.loads(path.read_text()).items() if path.is_file() else ():
        names = (names - set(changes[GONE])) | set(changes[NEW])
        found[release] = names
    return found


def write_options(package: str, known: Mapping[str, frozenset[str]]) -> None:
    """Write them as what each release has, and has no more, beside the one before it."""
    before: frozenset[str] = frozenset()
    listed = {}
    for release in sorted(known, key=order):
        names = known[release]
        listed[release] = {NEW: sorted(names - before), GONE: sorted(before - names)}
        before = names
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{package}.json").write_text(json.dumps(listed, indent=1) + "\n")


def add_options(package: str, release: str, names: frozenset[str]) -> None:
    """Write those of one release beside the others."""
    write_options(package, read_options(package) | {public(release): names})


def changed_options(package: str, release: str, names: frozenset[str]) -> Iterator[str]:
    """Yield which options a release has and the newest older one has not, and the other way.

    Args:
        package: What the engine is imported as.
        release: The release, listed or not.
        names: Its options.
    """
    known = read_options(package)
    older = [one for one in known if order(one) < order(release)]
    if not older:
        return
    before = known[older[-1]]
    if new := sorted(names - before):
        yield f"options that {older[-1]} does not have, to be read: {', '.join(new)}"
    if gone := sorted(before - names):
        yield f"options that {older[-1]} has, gone or renamed: {', '.join(gone)}"


def _classes(sources: Sources, where: Declarations) -> Iterator[ast.ClassDef]:
    tree = sources.tree(where.module)
    if tree is None:
        return
    yield from (one for one in _classes_of(tree) if one.name == where.owner)
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for module in sorted(name for name in imported if name.startswith(where.package)):
        found = sources.tree(module)
        if found is not None:
            yield from _classes_of(found)


def _classes_of(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in tree.body if isinstance(node, ast.ClassDef))
