"""Who else has a name that we rebind: a module that imported it keeps the original."""

import ast
from collections.abc import Iterable

from kvcached_patches.hook import REBIND, Hook
from kvcached_patches.sources import Sources


def aliases(hooks: Iterable[Hook], sources: Sources, package: str) -> dict[str, list[str]]:
    """Return, for each name that is rebound, the other modules that import it by name.

    Args:
        hooks: The hooks.
        sources: The engine.
        package: Its package.
    """
    rebound = {hook.path[-1]: hook for hook in hooks if hook.how == REBIND}
    found: dict[str, list[str]] = {hook.target: [] for hook in rebound.values()}
    for module in sources.modules(package):
        source = sources.read(module) or b""
        if not any(name.encode() in source for name in rebound):
            continue
        for node in ast.walk(ast.parse(source, module)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    hook = rebound.get(alias.name)
                    if hook is not None and module != hook.module:
                        found[hook.target].append(module)
    return {target: sorted(set(modules)) for target, modules in found.items()}
