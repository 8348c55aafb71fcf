"""Where vLLM loads a model: a kept host copy may have its weights already."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import TYPE_CHECKING, Any

from kvcached_patches.around import around, setting

if TYPE_CHECKING:
    from kvcached_core.weights.restart import Restart

# What of vLLM's objects a model keeps numbers and tensors in.
PACKAGES = ("vllm.model_executor", "vllm.v1.attention")
# Where a model's layers enter themselves by name; one that is made a second time must not find the
# first one's there. The second is of newer releases.
_REGISTERS = ("static_forward_context", "static_all_moe_layers")

_loading: ContextVar["Restart | None"] = ContextVar("kvcached_loading", default=None)


@contextmanager
def restarting(restart: "Restart | None") -> Iterator[None]:
    """Let the first model that is loaded inside have its weights from a copy, if it can."""
    with setting(_loading, restart):
        yield


def _registers_kept(vllm_config: Any) -> Callable[[], None]:
    """Return what brings the registers of layers back to what they are now."""
    compilation = vllm_config.compilation_config
    registers = [getattr(compilation, name, None) for name in _REGISTERS]
    before = [(register, copy(register)) for register in registers if register is not None]

    def undo() -> None:
        for register, content in before:
            register.clear()
            add = register.update if isinstance(register, dict) else register.extend
            add(content)

    return undo


@around
def loader_load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `BaseModelLoader.load_model`; other loaders than the default one are left alone."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    restart = _loading.get()
    if restart is None or type(self) is not DefaultModelLoader:
        return original(self, *args, **kwargs)
    undo = _registers_kept(kwargs["vllm_config"] if "vllm_config" in kwargs else args[0])

    def make_up() -> Any:
        config = copy(self.load_config)
        config.load_format, config.model_loader_extra_config = "dummy", {}
        return original(DummyModelLoader(config), *args, **kwargs)

    with setting(_loading, None):  # what is loaded beside the model is not in its copy
        return restart.load(make_up, lambda: original(self, *args, **kwargs), undo)
