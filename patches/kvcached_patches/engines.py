"""The engines that we hook: their packages on the index, and the releases we mean to serve."""

from dataclasses import dataclass

from kvcached_patches import sglang, vllm
from kvcached_patches.hook import Hook


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        package: What it is imported as.
        oldest: For each package on the index, the oldest release that we serve.
        hooks: What we hook, and what else of it we lean on.
    """

    package: str
    oldest: dict[str, str]
    hooks: tuple[Hook, ...]


ENGINES = {
    "vllm": Engine("vllm", vllm.OLDEST_RELEASES, vllm.LOCKED),
    "sglang": Engine("sglang", sglang.OLDEST_RELEASES, sglang.LOCKED),
}
DISTRIBUTIONS = {
    distribution: engine for engine in ENGINES.values() for distribution in engine.oldest
}
