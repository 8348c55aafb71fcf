"""Lets gateways in Ray's workers fork their engines from a parent that has imported them.

Python imports a module of this name at its start, where the path leads to it: on nodes of tests.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

NODE = "kvcached_ray.node"  # what has the gateway of a node


def warm(serving: Callable[..., Any]) -> Callable[..., Any]:
    """Return a way to serve that has the engine imported before it begins."""

    @asynccontextmanager
    async def serving_warm(*arguments: Any, **named: Any) -> AsyncIterator[Any]:
        from helpers.gateway_life import launch_warm, warm_up
        from helpers.ray_models import COLD

        from kvcached_gateway.engines.process import launch

        def launch_some(words: Sequence[str], *more: Any) -> Any:
            is_cold = any(Path(word).name == COLD for word in words if Path(word).is_dir())
            return (launch if is_cold else launch_warm)(words, *more)

        await asyncio.to_thread(warm_up, "vllm")
        async with serving(*arguments, **named, launch=launch_some) as here:
            yield here

    return serving_warm


class Warming(MetaPathFinder):
    """Gives the module of a node's gateway another way to start engines, when it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec as it is, with a step behind its execution."""
        if name != NODE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_warm(module: ModuleType) -> None:
            execute(module)
            vars(module)["serving"] = warm(module.serving)

        vars(spec.loader)["exec_module"] = execute_and_warm
        return spec


sys.meta_path.insert(0, Warming())
