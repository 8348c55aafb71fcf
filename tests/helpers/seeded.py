"""Dummy weights of a seed of their own: a `--worker-extension-cls` for its import alone.

vLLM's dummy weights are the same in every engine, and nearly zero. Two models that are mistaken for
each other shall answer differently, and before anything looks at their weights.
"""

import os
from typing import Any

from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from helpers.gpu_offline import fill

SEED = "DUMMY_SEED"

_load_weights = DummyModelLoader.load_weights


def _load_seeded(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    _load_weights(self, model, *args, **kwargs)
    fill(model, int(os.environ[SEED]))


if SEED in os.environ:
    DummyModelLoader.load_weights = _load_seeded  # type: ignore[method-assign]  # what it is for


class Seeded:
    """It adds nothing to a worker."""
