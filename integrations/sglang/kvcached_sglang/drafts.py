"""The layers of draft models: further planes of the target's pages.

A draft has a pool of its own, and finds its keys and values by the ids that the target's allocator
hands out. So what is mapped for one has to be mapped for the other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory import layer_tensors
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.layer_tensors import PoolShape
from kvcached_sglang.speculating import REMOVE


@dataclass(frozen=True)
class Target:
    """The target's pool: its own planes, and the pages that they lie in."""

    shape: PoolShape
    geometry: Geometry
    arena: Arena


class Drafts:
    """The draft models of one scheduler, known before the target's pool is made.

    The scheduler's thread calls it, at the start.
    """

    def __init__(self) -> None:
        self._runners: list[Any] = []
        self._target: Target | None = None
        self._num_placed = 0

    @property
    def is_expected(self) -> bool:
        """Whether a draft's pool comes next."""
        return self._target is not None and bool(self._runners)

    def add(self, runner: Any) -> None:
        """Note a draft's model runner, of which the weights are about to be loaded."""
        self._runners.append(runner)

    def with_planes(self, shape: PoolShape, num_layers: int) -> PoolShape:
        """Return the planes of the target's pool with those of its drafts.

        A draft is taken to have as many planes for each layer; its own pool is looked at later.

        Args:
            shape: The target's planes.
            num_layers: The target's layers.

        Raises:
            UnsupportedEngineError: If the target's planes differ in block size.
        """
        self._refuse_classes("target", shape)
        per_layer = shape.num_planes // num_layers
        num_more = sum(map(_num_layers, self._runners)) * per_layer
        return replace(shape, num_planes=shape.num_planes + num_more)

    def follow(self, shape: PoolShape, geometry: Geometry, arena: Arena) -> None:
        """Note where the target's planes lie: the drafts' follow in the same pages."""
        self._target = Target(shape, geometry, arena)

    def lay_out(self, create_buffers: Callable[[], None], pool: Any, shape: PoolShape) -> None:
        """Let a draft's pool make its planes behind those that are there.

        Args:
            create_buffers: What makes them.
            pool: SGLang's pool, whose `size` becomes the target's.
            shape: The planes that it makes.

        Raises:
            UnsupportedEngineError: If they do not fit the target's pages.
        """
        self._refuse_classes("draft", shape)
        target = self._target
        assert target is not None  # noqa: S101
        geometry, first_plane = target.geometry, target.shape.num_planes + self._num_placed
        for what, value, allowed in (
            ("bytes of a token in one layer", shape.row_bytes, target.shape.row_bytes),
            ("tokens of a block", shape.block_tokens, target.shape.block_tokens),
        ):
            if value != allowed:
                raise UnsupportedEngineError(
                    f"speculative decoding: the draft's {what} are {value}, the target's "
                    f"{allowed}; both lie in the same pages: choose another draft, or {REMOVE}"
                )
        num_left = geometry.num_planes - first_plane
        if shape.num_planes > num_left:
            raise UnsupportedEngineError(
                f"speculative decoding: the draft's pool has {shape.num_planes} planes, expected "
                f"at most {num_left}; {REMOVE}"
            )
        num_rows = layer_tensors.num_rows(shape, geometry, target.arena.num_pages)
        pool.size = num_rows - shape.block_tokens
        layer_tensors.lay_out(create_buffers, shape, geometry, target.arena, first_plane)
        self._num_placed += shape.num_planes

    def _refuse_classes(self, whose: str, shape: PoolShape) -> None:
        if self._runners and shape.others:
            sizes = [each.block_bytes for each in shape.classes]
            raise UnsupportedEngineError(
                f"speculative decoding: the {whose}'s planes differ in block size ({sizes} bytes), "
                f"and nobody has tried it; {REMOVE}"
            )


def _num_layers(runner: Any) -> int:
    owner = getattr(runner, "layer_info", runner)  # its own up to 0.5.15
    num_layers: int = owner.num_effective_layers
    return num_layers
