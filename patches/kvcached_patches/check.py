"""Whether hooks fit an engine, from its source files alone: nothing of the engine is imported."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from kvcached_patches.hook import Finding, Hook

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def choose_targets(hooks: Iterable[Hook], root: Path) -> tuple[Hook, ...]:
    """Return `hooks`, each with the first target whose module is under `root`."""
    return tuple(_chosen(hook, root) for hook in hooks)


def check_hooks(hooks: Iterable[Hook], root: Path) -> list[Finding]:
    """Return why `hooks` do not fit the engine under `root`, a folder with its packages in it."""
    trees: dict[str, ast.Module | None] = {}
    findings = []
    for hook in hooks:
        if hook.module not in trees:
            trees[hook.module] = _parse(root, hook.module)
        tree = trees[hook.module]
        problem = "the module is gone" if tree is None else _problem(hook, tree)
        if problem:
            findings.append(Finding(hook.target, problem))
    return findings


def _chosen(hook: Hook, root: Path) -> Hook:
    for target in (hook.target, *hook.alternatives):
        candidate = replace(hook, target=target, alternatives=())
        if _file(root, candidate.module) is not None:
            return candidate
    return replace(hook, alternatives=())


def _parse(root: Path, module: str) -> ast.Module | None:
    file = _file(root, module)
    return None if file is None else ast.parse(file.read_bytes(), str(file))


def _file(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    return next(
        (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None
    )


def _problem(hook: Hook, tree: ast.Module) -> str | None:
    scope: ast.AST = tree
    for name in hook.path:
        found = next((node for node in _members(scope) if name in _names(node)), None)
        if found is None:
            return f"{name} is not defined there"
        scope = found
    if not hook.parameters:
        return None
    if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        return "it is not a function"
    arguments = scope.args
    present = {
        argument.arg
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    }
    missing = [name for name in hook.parameters if name not in present]
    return f"it has no parameter {', '.join(missing)}" if missing else None


def _members(scope: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, those under `if` and `try` included."""
    for field in ("body", "orelse", "handlers", "finalbody"):
        for node in getattr(scope, field, []):
            if isinstance(node, (ast.If | ast.Try | ast.With, ast.ExceptHandler)):
                yield from _members(node)
            else:
                yield node


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, _Definition):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
