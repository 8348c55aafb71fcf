"""Where an engine's Python files are read from: a folder or a wheel. Nothing of it is imported."""

import ast
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path


class Sources(ABC):
    """The Python files of one engine."""

    def __init__(self) -> None:
        self._trees: dict[str, ast.Module | None] = {}

    @abstractmethod
    def read(self, module: str) -> bytes | None:
        """Return the source of a module, or None if there is no such module."""

    @abstractmethod
    def modules(self, package: str) -> Iterator[str]:
        """Yield the modules of a package that are there."""

    def tree(self, module: str) -> ast.Module | None:
        """Return the syntax tree of a module, or None if there is no such module."""
        if module not in self._trees:
            source = self.read(module)
            self._trees[module] = None if source is None else ast.parse(source, module)
        return self._trees[module]


class Folder(Sources):
    """An installed engine, or one unpacked: a folder with its packages in it."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def read(self, module: str) -> bytes | None:
        """See `Sources`."""
        base = self.root.joinpath(*module.split("."))
        files = (base.with_suffix(".py"), base / "__init__.py")
        return next((file.read_bytes() for file in files if file.is_file()), None)

    def modules(self, package: str) -> Iterator[str]:
        """See `Sources`."""
        for file in sorted((self.root / package).rglob("*.py")):
            yield _module(file.relative_to(self.root).as_posix())


class Wheel(Sources):
    """A wheel, as a file or as a `zipfile.ZipFile` that reads it elsewhere."""

    def __init__(self, wheel: Path | zipfile.ZipFile) -> None:
        super().__init__()
        self._zip = zipfile.ZipFile(wheel) if isinstance(wheel, Path) else wheel

    @cached_property
    def _files(self) -> dict[str, str]:
        return {_module(name): name for name in self._zip.namelist() if name.endswith(".py")}

    def read(self, module: str) -> bytes | None:
        """See `Sources`."""
        file = self._files.get(module)
        return None if file is None else self._zip.read(file)

    def modules(self, package: str) -> Iterator[str]:
        """See `Sources`."""
        return (module for module in self._files if module.split(".")[0] == package)


def _module(file: str) -> str:
    parts = file.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
