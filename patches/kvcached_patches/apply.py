"""Applying hooks, all or none, and taking them back."""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from kvcached_patches.hook import REBIND, Hook, HookError


class Patcher:
    """The hooks of one engine in this process.

    A hook is applied at once where its module is imported already, and right after the import where
    it is not, so that a process pays only for the engine modules that it uses.

    Args:
        hooks: What to apply.
        on_misfit: Told why, when a hook does not fit and all are taken back; by default the error
            is raised where the module is imported.
    """

    def __init__(
        self, hooks: Iterable[Hook], on_misfit: Callable[[HookError], None] | None = None
    ) -> None:
        self._on_misfit = on_misfit
        self._waiting: dict[str, list[Hook]] = {}
        for hook in hooks:
            self._waiting.setdefault(hook.module, []).append(hook)
        self._done: list[_Patch] = []
        self._finder = _AfterImport(self)

    @property
    def applied(self) -> list[str]:
        """The targets that are replaced by now."""
        return [patch.hook.target for patch in self._done]

    def apply(self) -> None:
        """Apply what can be applied now, the rest when its module is imported.

        Raises:
            HookError: If a hook does not fit; then none is applied any more.
        """
        if self._finder not in sys.meta_path:
            sys.meta_path.insert(0, self._finder)
        for name in list(self._waiting):
            module = sys.modules.get(name)
            if module is not None:
                self.patch_module(module)

    def waits_for(self, module: str) -> bool:
        """Return whether hooks wait for the import of `module`."""
        return module in self._waiting

    def patch_module(self, module: ModuleType) -> None:
        """Apply the hooks that wait for `module`, which is imported now."""
        try:
            for hook in self._waiting.pop(module.__name__, []):
                self._done.append(_Patch(hook, module))
        except Exception as error:
            self.revert()
            misfit = HookError(f"{module.__name__} cannot be hooked: {error}")
            if self._on_misfit is None:
                raise misfit from error
            self._on_misfit(misfit)

    def revert(self) -> None:
        """Put every original back, last replaced first.

        Raises:
            HookError: If somebody else wrapped a target after us; then nothing is reverted.
        """
        foreign = [patch.hook.target for patch in self._done if not patch.is_in_place()]
        if foreign:
            raise HookError(f"cannot revert under someone else's wrapper: {', '.join(foreign)}")
        self._waiting.clear()
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        while self._done:
            self._done.pop().revert()


class _Patch:
    """One replaced symbol."""

    def __init__(self, hook: Hook, module: ModuleType) -> None:
        self.hook = hook
        *parents, self._name = hook.path
        self._owner: Any = module
        for name in parents:
            self._owner = getattr(self._owner, name)
        # Read past inheritance: what a class only inherits is hooked where it is defined.
        if self._name not in vars(self._owner):
            raise HookError(f"{hook.target} is not defined there")
        self._original = vars(self._owner)[self._name]
        if hook.how != REBIND:
            _refuse_a_stranger(hook, self._original, module)
        self._replacement = _resolve(hook.replacement)(self._original)
        setattr(self._owner, self._name, self._replacement)

    def is_in_place(self) -> bool:
        return vars(self._owner)[self._name] is self._replacement

    def revert(self) -> None:
        setattr(self._owner, self._name, self._original)


def _refuse_a_stranger(hook: Hook, original: Any, module: ModuleType) -> None:
    """Refuse a target that is no longer the engine's own: two wrappers that do not know each other.

    A decorator of the engine's own wraps, too, but what is inside is defined in the module's file.
    """
    function = getattr(original, "__func__", original)
    num_layers, file = 0, module.__file__
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        num_layers += 1
    if not inspect.isfunction(function):
        return
    outer = getattr(original, "__func__", original)
    own = function.__code__.co_filename == file
    if not own or num_layers > hook.num_decorators:
        where = outer.__code__.co_filename if inspect.isfunction(outer) else type(outer).__name__
        raise HookError(f"{hook.target} was wrapped by somebody else already ({where})")


class _AfterImport(MetaPathFinder):
    """Lets a module load as it always does and then hands it to the patcher."""

    def __init__(self, patcher: Patcher) -> None:
        self._patcher = patcher

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self._patcher.waits_for(fullname):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, self._patcher)
        return spec


class _PatchingLoader(Loader):
    def __init__(self, inner: Loader, patcher: Patcher) -> None:
        self._inner = inner
        self._patcher = patcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        self._patcher.patch_module(module)


def _resolve(reference: str) -> Callable[[Any], Any]:
    module, _, name = reference.partition(":")
    resolved: Callable[[Any], Any] = getattr(import_module(module), name)
    return resolved
