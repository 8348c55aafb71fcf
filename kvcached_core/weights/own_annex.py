"""A worker's annex: its runner's large buffers and its graph pool, and host memory for both."""

import logging
import os
from collections.abc import Collection
from typing import Any

from kvcached_core.config import CUDA, Config, WeightsMode
from kvcached_core.errors import HostCopyError, OutOfMemoryError
from kvcached_core.memory.torch_device import (
    find_device,
    make_backend,
    release_cached_blocks,
    with_index,
)
from kvcached_core.units import format_bytes
from kvcached_core.weights.annex import Annex
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.graph_pool import TorchPool
from kvcached_core.weights.key import short_name
from kvcached_core.weights.scratch import Roots, Scratch, find_scratch
from kvcached_core.weights.shelf import Shelf

logger = logging.getLogger("kvcached")

# What torch's allocator is set up by: the first one that is set counts.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# Graphs may live, and allocate, as long as the process.
_pools: list[TorchPool] = []


class OwnAnnex:
    """What a worker keeps beside its weights and its KV cache, on memory of ours.

    Attributes:
        annex: Where it lies.
        graph_pool: What names the pool that CUDA graphs are to be captured in; None on a host.

    Args:
        device: Where the worker runs, as torch names it.
        config: The settings.
        name: What it is for, for people.
    """

    def __init__(self, device: Any, config: Config, name: str) -> None:
        backend = make_backend(device)
        cpus = find_device(device, config).near_cpus()
        self._device = with_index(device)
        self._pid = os.getpid()
        self._shelf = Shelf(name, make_budget(config), backend, cpus)
        self.annex = Annex(backend, self._shelf.room)
        self._scratch = Scratch(self.annex)
        self._pool: TorchPool | None = None
        if device.type == CUDA:
            self._pool = TorchPool(self.annex)
            _pools.append(self._pool)

    @property
    def graph_pool(self) -> tuple[int, int] | None:
        """See the class."""
        return None if self._pool is None else self._pool.id

    def move(
        self, roots: Roots, packages: Collection[str], forgotten: Collection[str] = ()
    ) -> None:
        """Move an engine's buffers to the annex, unless graphs have been captured.

        Args:
            roots: Where buffers are found, see `find_scratch`.
            packages: The same.
            forgotten: Attributes whose content is of no worth when nothing runs, see `Scratch`.

        Raises:
            BackendError: If there is no memory. What was moved before stays moved.
        """
        if self._pool is not None and self._pool.memory.num_bytes:
            logger.info("kvcached: buffers stay where they were: graphs have their addresses")
            return
        self._scratch.move(find_scratch(roots, packages, self._device), forgotten)
        if self._pool is not None:
            self._pool.take_workspaces()
            release_cached_blocks()

    def prepare(self) -> None:
        """Have host memory for it; all that is to lie there does."""
        graphs_bytes = 0 if self._pool is None else self._pool.memory.num_bytes
        try:
            self.annex.prepare()
        except (HostCopyError, OutOfMemoryError) as error:
            logger.warning("kvcached: buffers and graphs may have to stay: %s", error)
        logger.info(
            "kvcached: %s of buffers and %s of CUDA graphs go with the weights",
            format_bytes(self.annex.num_bytes - graphs_bytes),
            format_bytes(graphs_bytes),
        )

    def close(self) -> None:
        """Give everything back. Nothing of it may be used any more.

        A forked child owns nothing of it: it does nothing there.
        """
        if os.getpid() == self._pid:
            self.annex.close()
            self._shelf.close()


def make_annex(device: Any, config: Config, model: str) -> OwnAnnex | None:
    """Return a worker's annex, or None if all it keeps beside its weights stays.

    Args:
        device: Where the worker runs, as torch names it; a GPU is the current one.
        config: The settings.
        model: The model's name or path.
    """
    if config.buffers is not WeightsMode.YIELD:
        return None
    if device.type == CUDA and _has_expandable_segments():
        logger.warning(
            "kvcached: buffers and CUDA graphs stay: with expandable segments torch captures none "
            "in memory of others; remove expandable_segments from PYTORCH_ALLOC_CONF"
        )
        return None
    return OwnAnnex(device, config, f"{short_name(model)}'s buffers")


def _has_expandable_segments() -> bool:
    settings = next(filter(None, map(os.environ.get, _ALLOCATOR_SETTINGS)), "")
    return "expandable_segments:true" in settings.replace(" ", "").lower().split(",")
