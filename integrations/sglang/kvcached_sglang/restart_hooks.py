"""Where SGLang loads a model: a kept host copy may have its weights already."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import TYPE_CHECKING, Any

from kvcached_patches.around import around, setting

if TYPE_CHECKING:
    from kvcached_core.weights.restart import Restart

# What of SGLang's objects a model keeps numbers and tensors in.
PACKAGES = ("sglang.srt.layers", "sglang.srt.models")

_loading: ContextVar["Restart | None"] = ContextVar("kvcached_loading", default=None)


@contextmanager
def restarting(restart: "Restart | None") -> Iterator[None]:
    """Let the first model that is loaded inside have its weights from a copy, if it can."""
    with setting(_loading, restart):
        yield


@around
def loader_load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `DefaultModelLoader.load_model`; what is derived from that loader is left alone."""
    from sglang.srt.model_loader.loader import DefaultModelLoader, DummyModelLoader

    restart = _loading.get()
    if restart is None or type(self) is not DefaultModelLoader:
        return original(self, *args, **kwargs)

    def make_up() -> Any:
        config = copy(self.load_config)
        config.load_format, config.model_loader_extra_config = "dummy", {}
        return DummyModelLoader(config).load_model(*args, **kwargs)

    with setting(_loading, None):  # what is loaded beside the model is not in its copy
        return restart.load(make_up, lambda: original(self, *args, **kwargs), lambda: None)
