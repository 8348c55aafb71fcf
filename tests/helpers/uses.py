"""What an adapter leans on in its engine, found in the sources of both; nothing is imported.

What this sees: names imported from the engine, and what is read of them; methods that a subclass of
ours overrides, or that read what it puts in another thing's place; what a hook and a subclass read
of `self`; and every attribute, of anything, with a name that is neither ours nor a library's. It
does not see an attribute of an engine's object whose name some code of ours has as well.
"""

import ast
import copy
import logging
import threading
from argparse import ArgumentParser, Namespace
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import Signature
from multiprocessing import Process
from pathlib import Path
from queue import Queue
from types import FunctionType

import torch

from kvcached_patches.hook import OVERRIDE, Hook
from kvcached_patches.sources import Sources

ROOT = Path(__file__).parents[2]
CORE = (ROOT / "kvcached_core", ROOT / "patches")
Function = ast.FunctionDef | ast.AsyncFunctionDef
READERS = ("getattr", "hasattr", "setattr")

# Attributes with these names are those of Python's and torch's objects ...
LIBRARY_TYPES = (
    *(str, bytes, int, float, list, dict, set, tuple, type, property, classmethod, FunctionType),
    *(SystemExit, ImportError, Counter, OrderedDict, Future, Queue, Path, Process, Signature),
    *(ArgumentParser, Namespace, ContextVar, logging.Logger, logging.LogRecord, threading.Thread),
    *(ExitStack, torch.Tensor, torch.Size, torch.dtype, torch.nn.Module, ast.AST),
)
# ... these of a logger and of a line of it, which their classes do not say ...
LOGS = (logging.getLogger(), logging.makeLogRecord({}))
# ... and these of CUDA streams and devices, of which there are no classes without a GPU, and of a
# model's configuration, which is Hugging Face's. The last one SGLang sets by a computed name, so no
# lock can have it; the method that reads it is in the table.
LIBRARY_NAMES = frozenset(
    {
        "architectures",
        "cuda_stream",
        "total_memory",
        "uuid",
        "resume_memory_occupation_communicator",
    }
)


@dataclass(frozen=True)
class Use:
    """One thing that an adapter leans on.

    Attributes:
        where: File and line.
        symbol: What has to be in the table: `module:name`, or a member's name alone.
        is_override: Whether it has to be there as one whose body is locked.
        others: What may be there instead: the same attribute of a base.
    """

    where: str
    symbol: str
    is_override: bool = False
    others: tuple[str, ...] = ()


class Table:
    """Hooks and uses, to look in."""

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._targets = {
            target: hook for hook in hooks for target in (hook.target, *hook.alternatives)
        }
        paths = (target.partition(":")[2] for target in self._targets)
        self._names = {name for path in paths for name in path.split(".")}

    def has(self, use: Use) -> bool:
        """Return whether a use is in the table."""
        if ":" not in use.symbol:
            return use.symbol in self._names
        if use.is_override:
            found = self._targets.get(use.symbol)
            return found is not None and found.how == OVERRIDE
        return any(
            target == symbol or target.startswith(f"{symbol}.")
            for symbol in (use.symbol, *use.others)
            for target in self._targets
        )

    def missing(self, uses: Iterable[Use]) -> list[str]:
        """Return what is not in the table, each with where it is used and what to do."""
        return sorted(
            {
                f"{use.where}: add {use.symbol}{' as OVERRIDE' * use.is_override} to the table of "
                "what we use, and write the locks anew (docs/adding-an-engine-release.md)"
                for use in uses
                if not self.has(use)
            }
        )


class Adapter:
    """The source of an adapter, beside that of its engine.

    Args:
        folder: Where its modules are.
        package: What the engine is imported as.
        engine: The engine's files.
    """

    def __init__(self, folder: Path, package: str, engine: Sources) -> None:
        self.package = package
        self.engine = engine
        self.modules = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}

    def uses(self, hooks: Iterable[Hook]) -> Iterator[Use]:
        """Yield everything that it leans on, as far as this sees it.

        Args:
            hooks: Where they are in the engine's release.
        """
        yield from self.imported()
        yield from self.overridden()
        yield from self.read_of_self(hook for hook in hooks if hook.replacement)
        yield from self.named()

    def imported(self) -> Iterator[Use]:
        """Yield what is imported of the engine, and what is read of that by name."""
        for path, tree in self.modules.items():
            names = self._engine_names(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield from (Use(_where(path, node), what) for what in self._imports(node))
                    continue
                chain = _chain(node)
                if len(chain) > 1 and chain[0] in names:
                    yield Use(_where(path, node), self._read_of(names[chain[0]], chain[1:]))
                if isinstance(node, ast.Call) and node.keywords:
                    yield from self._fields(path, node, names)

    def _imports(self, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        """Yield what a statement imports of the engine, modules left out."""
        for alias in node.names:
            if isinstance(node, ast.Import):
                if alias.name.split(".")[0] == self.package:
                    yield f"{alias.name}:"
            elif self._is_engines(node) and not self.engine.tree(f"{node.module}.{alias.name}"):
                yield f"{node.module}:{alias.name}"

    def overridden(self) -> Iterator[Use]:
        """Yield the engine's methods in whose place ours run, or that read what ours put there."""
        for path, tree in self.modules.items():
            names = self._engine_names(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    for base in node.bases:
                        symbol = names.get(base.id) if isinstance(base, ast.Name) else None
                        if symbol is not None:
                            yield from self._of_class(path, node, symbol)

    def read_of_self(self, hooks: Iterable[Hook]) -> Iterator[Use]:
        """Yield what the function in a method's place reads of `self`."""
        for hook in hooks:
            name, is_method = hook.path[-1], len(hook.path) > 1
            function = self.replacement(hook)
            if function is None or not is_method or not function[1].args.args:
                continue
            path, wrapper = function
            owner = f"{hook.module}:{'.'.join(hook.path[:-1])}"
            for node in ast.walk(wrapper):
                for read in _reads(node, of=wrapper.args.args[0].arg):
                    if not _is_known(read) and read != name:
                        yield self._use(_where(path, node), owner, read) or Use(
                            _where(path, node), read
                        )

    def named(self) -> Iterator[Use]:
        """Yield every attribute with a name that is neither ours nor a library's."""
        own = {name for tree in self._own_trees() for name in _defined(tree)}
        for path, tree in self.modules.items():
            foreign = self._foreign_names(tree)
            for node in ast.walk(tree):
                for name in _reads(node):
                    if name not in own and not _is_known(name) and _root(node) not in foreign:
                        yield Use(_where(path, node), name)

    def words(self) -> set[str]:
        """Return every name and every text in the source."""
        found = set()
        for node in (node for tree in self.modules.values() for node in ast.walk(tree)):
            found.update(value for value in vars(node).values() if isinstance(value, str))
            if isinstance(node, ast.ImportFrom | ast.Import):
                found.update(alias.name for alias in node.names)
        return found

    def replacement(self, hook: Hook) -> tuple[Path, Function] | None:
        """Return the function that takes a target's place, and its file; None if it is no function.

        It is the one that the hook's function returns, or that function itself, without the
        original, where `around` decorates it, or what `around_found` returns.
        """
        module, _, name = hook.replacement.partition(":")
        for path, tree in self.modules.items():
            if path.stem == module.rpartition(".")[2]:
                for outer in tree.body:
                    if isinstance(outer, ast.FunctionDef) and outer.name == name:
                        found = list(_standing_in(outer))
                        return (path, found[-1]) if found else None
        return None

    def override(self, target: str) -> tuple[Path, Function] | None:
        """Return our method in the place of the engine's `target`, and its file, or None."""
        owner, _, name = target.partition(":")[2].rpartition(".")
        # A base that is known only when the code runs may be any class.
        return self._methods.get((owner, name)) or self._methods.get(("", name))

    @cached_property
    def _methods(self) -> dict[tuple[str, str], tuple[Path, Function]]:
        """Our methods and their files, by the engine's class under ours, and their names."""
        found = {}
        for path, tree in self.modules.items():
            names, foreign = self._engine_names(tree), self._foreign_names(tree)
            classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
            for node in classes:
                for base in (base for base in node.bases if _root(base) not in foreign):
                    owner = names.get(_root(base) or "", "").partition(":")[2]
                    for method in node.body:
                        if isinstance(method, Function):
                            found[owner, method.name] = path, method
        return found

    def _fields(self, path: Path, call: ast.Call, names: dict[str, str]) -> Iterator[Use]:
        """Yield the fields that a call of an engine's class sets, unless it has an `__init__`."""
        symbol = names.get(call.func.id, "") if isinstance(call.func, ast.Name) else ""
        module, _, name = symbol.partition(":")
        if not name or self._use("", symbol, "__init__"):
            return
        if self._class(module, name) is not None:
            for keyword in call.keywords:
                use = self._use(_where(path, call), symbol, keyword.arg or "")
                if use is not None:
                    yield use

    def _of_class(self, path: Path, ours: ast.ClassDef, symbol: str) -> Iterator[Use]:
        methods = {node.name: node for node in ours.body if isinstance(node, Function)}
        for name, method in methods.items():
            use = self._use(_where(path, method), symbol, name)
            if use is not None:
                yield replace(use, is_override=True)
        for node in ast.walk(ours):
            for read in _reads(node, of="self"):
                use = self._use(_where(path, node), symbol, read)
                if use is not None and read not in methods:
                    yield use
        replaced, ours_or_made = self._assigned - set(methods), {*methods, "__init__"}
        for owner, node in self._line(symbol):
            own = replaced & set(_defined(node))
            for method in node.body:
                is_inherited = isinstance(method, Function) and method.name not in ours_or_made
                if is_inherited and own & {
                    read for part in ast.walk(method) for read in _reads(part, of="self")
                }:
                    where = _where(path, ours)
                    yield Use(where, f"{owner}.{method.name}", is_override=True)

    @cached_property
    def _assigned(self) -> set[str]:
        """The attributes that the adapter sets, of anything."""
        nodes = (node for tree in self.modules.values() for node in ast.walk(tree))
        return {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }

    def _read_of(self, symbol: str, names: list[str]) -> str:
        """Return the symbol that is read of a module or class; of anything else the name alone."""
        if symbol.endswith(":"):
            return symbol + ".".join(names)
        return ".".join((symbol, *names)) if self._class(*symbol.split(":")) else names[-1]

    def _use(self, where: str, symbol: str, name: str) -> Use | None:
        """Return the use of a class's member `name`; None if neither it nor a base has it."""
        owners = [owner for owner, node in self._line(symbol) if name in set(_defined(node))]
        if not owners:
            return None
        first, *others = (f"{owner}.{name}" for owner in owners)
        return Use(where, first, others=tuple(others))

    def _line(self, symbol: str) -> Iterator[tuple[str, ast.ClassDef]]:
        module, _, name = symbol.partition(":")
        found = self._class(module, name)
        if found is None:
            return
        owner, node = found
        yield owner, node
        names = self._engine_names(self.engine.tree(owner.partition(":")[0]))
        for base in node.bases:
            text = _root(base) or ""
            yield from self._line(names.get(text, f"{owner.partition(':')[0]}:{text}"))

    def _class(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """Return where a class is defined, and its definition; imports are followed."""
        tree = self.engine.tree(module)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                return f"{module}:{name}", node
            if isinstance(node, ast.ImportFrom) and self._is_engines(node):
                for alias in node.names:
                    if (alias.asname or alias.name) == name and node.module != module:
                        return self._class(str(node.module), alias.name)
        return None

    def _engine_names(self, tree: ast.Module | None) -> dict[str, str]:
        """Return what a module's names of the engine stand for: `module:name`, or `module:`."""
        found = {}
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.ImportFrom) and self._is_engines(node):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_module = self.engine.tree(inner) is not None
                    symbol = f"{inner}:" if is_module else f"{node.module}:{alias.name}"
                    found[alias.asname or alias.name] = symbol
        return found

    def _foreign_names(self, tree: ast.Module) -> set[str]:
        """Return the names in a module that stand for imported things of others and of ours."""
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            if isinstance(node, ast.ImportFrom) and not self._is_engines(node):
                found.update(alias.asname or alias.name for alias in node.names)
        return found

    def _is_engines(self, node: ast.ImportFrom) -> bool:
        return (node.module or "").split(".")[0] == self.package and not node.level

    def _own_trees(self) -> Iterator[ast.Module]:
        yield from self.modules.values()
        for folder in CORE:
            for path in folder.rglob("*.py"):
                yield ast.parse(path.read_text())


_LIBRARY = LIBRARY_NAMES.union(*(dir(kind) for kind in LIBRARY_TYPES), *map(vars, LOGS))


def _where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]


def _is_known(name: str) -> bool:
    """Return whether a name is one of Python's or torch's objects, or ours on an engine's."""
    return name in _LIBRARY or name.startswith(("kvcached", "__"))


def _root(node: ast.AST) -> str | None:
    """Return the name that an expression begins with."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
        if isinstance(node, ast.Name) and node.id in READERS:
            return None
    return node.id if isinstance(node, ast.Name) else None


def _chain(node: ast.AST) -> list[str]:
    """Return the names of `a.b.c`, or of `getattr(a, "b")`; otherwise nothing."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        inner = _chain(node.value)
        return [*inner, node.attr] if inner else []
    read = _read_by_name(node)
    return [*_chain(read[0]), read[1]] if read and _chain(read[0]) else []


def _read_by_name(node: ast.AST) -> tuple[ast.expr, str] | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        owner, name = node.args[:2]
        if node.func.id in READERS and isinstance(name, ast.Constant):
            return owner, str(name.value)
    return None


def _reads(node: ast.AST, of: str | None = None) -> Iterator[str]:
    """Yield the name of the attribute that an expression reads or sets, of the name `of` alone."""
    read = (node.value, node.attr) if isinstance(node, ast.Attribute) else _read_by_name(node)
    if read is not None and (of is None or (isinstance(read[0], ast.Name) and read[0].id == of)):
        yield read[1]


def _defined(scope: ast.AST) -> Iterator[str]:
    """Yield the names that a module or class gives to functions, classes and attributes."""
    for node in ast.walk(scope):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from (node.attr for _ in _reads(node, of="self"))
        if isinstance(node, ast.Module | ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.Assign | ast.AnnAssign):
                    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                    yield from (target.id for target in targets if isinstance(target, ast.Name))


# What stands in for a method where a hook only runs the original before, after or around its own.
_PASSES_ALL = ast.parse("def alone(self, *args, **kwargs): call(*args, **kwargs)").body[0]


def _standing_in(hook: ast.FunctionDef) -> Iterator[ast.FunctionDef]:
    decorators = {one.id for one in hook.decorator_list if isinstance(one, ast.Name)}
    alone = copy.deepcopy(hook)
    if "around" in decorators:
        del alone.args.args[0]
        yield alone
    elif {"around_ours", "around_engine"} & decorators:
        assert isinstance(_PASSES_ALL, ast.FunctionDef)
        passes_all = copy.deepcopy(_PASSES_ALL)
        passes_all.args.args[0].arg = alone.args.args[2].arg.lstrip("_")
        alone.args = passes_all.args
        alone.body.extend(passes_all.body)
        yield alone
    else:
        yield from (one for one in hook.body if isinstance(one, ast.FunctionDef))
