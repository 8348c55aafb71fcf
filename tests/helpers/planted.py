"""Changes planted into an engine's own sources, as a patched build has them: are they refused?"""

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kvcached_patches.hook import OVERRIDE, Finding, Hook
from kvcached_patches.locks import examine
from kvcached_patches.policy import Installed
from kvcached_patches.sources import Folder, Sources
from kvcached_patches.symbols import find

Function = ast.FunctionDef | ast.AsyncFunctionDef
Edit = Callable[[list[str], ast.AST, str], None]


class Planted(Sources):
    """An engine's files, one of them with other text.

    Args:
        inner: The files as they are.
        module: The module that differs.
        text: Its text.
    """

    def __init__(self, inner: Sources, module: str, text: str) -> None:
        super().__init__()
        self._inner = inner
        self._module = module
        self._text = text

    def read(self, module: str) -> bytes | None:
        return self._text.encode() if module == self._module else self._inner.read(module)

    def tree(self, module: str) -> ast.Module | None:
        return super().tree(module) if module == self._module else self._inner.tree(module)

    def modules(self, package: str) -> Iterable[str]:  # type: ignore[override]
        return self._inner.modules(package)


def change_body(lines: list[str], node: ast.AST, _name: str) -> None:
    """Put a statement before the last one of a function."""
    assert isinstance(node, Function)
    last = node.body[-1]
    lines.insert(last.lineno - 1, " " * last.col_offset + "planted = True")


def change_signature(lines: list[str], node: ast.AST, _name: str) -> None:
    """Give the last parameter of a function another name, or, where it has none, a parameter."""
    assert isinstance(node, Function)
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    named = [one for one in given if one.arg not in ("self", "cls")]
    if named:
        row, column = named[-1].lineno - 1, named[-1].col_offset
        rest = lines[row][column:].removeprefix(named[-1].arg)
        lines[row] = f"{lines[row][:column]}planted{rest}"
    else:
        lines[node.lineno - 1] = lines[node.lineno - 1].replace("(", "(*planted, ", 1)


def take_away(lines: list[str], node: ast.AST, name: str) -> None:
    """Give an attribute of a class, or a name of a module, another name wherever it stands."""
    end = getattr(node, "end_lineno", None) or len(lines)
    for row in range(getattr(node, "lineno", 1) - 1, end):
        lines[row] = re.sub(rf"\b{name}\b", f"{name}_planted", lines[row])


def what_a_planted_change_finds(
    hooks: Iterable[Hook], installed: Installed, kind: str
) -> dict[str, list[Finding]]:
    """Plant a change at each target of a kind; return what is found, by target.

    Args:
        hooks: Where they are in the installed release.
        installed: The engine.
        kind: "body" of what a subclass of ours overrides, "signature" of what is called, or
            "attribute" that is read.
    """
    sources = Folder(installed.root)
    chosen: dict[str, list[tuple[Hook, ast.AST]]] = {}
    for hook in hooks:
        tree = sources.tree(hook.module)
        node = find(tree, hook.path) if tree is not None else ""
        if tree is not None and not isinstance(node, str) and _kind(hook, node) == kind:
            if kind == "attribute":
                parent = find(tree, hook.path[:-1])
                assert not isinstance(parent, str)
                node = parent
            chosen.setdefault(hook.module, []).append((hook, node))
    edit: Edit = {"body": change_body, "signature": change_signature, "attribute": take_away}[kind]
    found: dict[str, list[Finding]] = {}
    for module, targets in chosen.items():
        lines = (sources.read(module) or b"").decode().splitlines()
        for hook, node in sorted(targets, key=lambda one: -getattr(one[1], "lineno", 0)):
            edit(lines, node, hook.path[-1])
        planted = Planted(sources, module, "\n".join(lines))
        there = [hook for hook, _ in targets]
        findings = examine(there, installed.distribution, installed.release, planted)
        for hook in there:
            found[hook.target] = [one for one in findings if one.target == hook.target]
    return found


def _kind(hook: Hook, node: ast.AST) -> str:
    if hook.how == OVERRIDE:
        return "body"
    return "signature" if isinstance(node, Function) else "attribute"


def adapter_folder(package: str) -> Path:
    """Return where the modules of an engine's adapter are."""
    return Path(__file__).parents[2] / "integrations" / package
