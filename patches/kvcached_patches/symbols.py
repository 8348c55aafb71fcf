"""One symbol in a syntax tree: found, and told apart from what it was in another release."""

import ast
import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef
DIGITS = 16


@dataclass(frozen=True)
class Symbol:
    """What is known of a target, and nothing of its text.

    Attributes:
        signature: Its parameters with their defaults; for a name where it comes from.
        decorators: Decorators, as written.
        body: A hash of its source without comments and blank lines; empty for a name.
    """

    signature: str
    decorators: tuple[str, ...] = ()
    body: str = ""


def find(tree: ast.Module, path: list[str]) -> ast.AST | str:
    """Return the statement that binds the last name of `path`, or the name that is missing."""
    scope: ast.AST = tree
    for name in path:
        members = (node for node in _members(scope) if name in _names(node))
        found: ast.AST | None = next(members, None) or _attribute(scope, name)
        if found is None:
            return name
        scope = found
    return scope


def parameters_of(node: ast.AST) -> set[str] | None:
    """Return the names of a function's parameters, or None if it is no function."""
    if not isinstance(node, _Function):
        return None
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return {argument.arg for argument in arguments}


def describe(node: ast.AST, name: str, source: bytes) -> Symbol:
    """Return what is known of the symbol that a statement binds to `name`."""
    if isinstance(node, ast.ImportFrom):
        alias = next(alias for alias in node.names if name in (alias.asname, alias.name))
        dots = "." * node.level
        return Symbol(f"from {dots}{node.module or ''} import {alias.name}")
    if not isinstance(node, _Definition):
        return Symbol("a name")
    decorators = tuple(ast.unparse(decorator) for decorator in node.decorator_list)
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return Symbol(f"class ({bases})", decorators, _hash(node, source))
    return Symbol(f"({ast.unparse(node.args)})", decorators, _hash(node, source))


def _hash(node: ast.stmt, source: bytes) -> str:
    lines = source.decode().splitlines()[node.lineno - 1 : node.end_lineno]
    kept = (line.rstrip() for line in textwrap.dedent("\n".join(lines)).splitlines())
    text = "\n".join(line for line in kept if line and not line.lstrip().startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _members(scope: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, those under `if` and `try` included."""
    for field in ("body", "orelse", "handlers", "finalbody"):
        for node in getattr(scope, field, []):
            if isinstance(node, (ast.If | ast.Try | ast.With, ast.ExceptHandler)):
                yield from _members(node)
            else:
                yield node


def _attribute(scope: ast.AST, name: str) -> ast.AST | None:
    """Return where a class's methods set the attribute `name` of something, or None."""
    if not isinstance(scope, ast.ClassDef):
        return None
    for node in ast.walk(scope):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and node.attr == name
        ):
            return node
    return None


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
