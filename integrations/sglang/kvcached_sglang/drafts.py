"""The layers of draft models: further planes of the target's pages.

A draft has a pool of its own, and finds its keys and values by the ids that the target's allocator
hands out. So what is mapped for one has to be mapped for the other.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory import layer_tensors
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.layer_tensors import PoolShape
from kvcached_core.memory.size_classes import SizeClass
from kvcached_sglang.parallel import num_attention_parts
from kvcached_sglang.pools import count_blocks
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
        self._num_placed: Counter[int] = Counter()  # planes, by the bytes of a block

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
        Those of other bytes a token are a size class of their own.

        Args:
            shape: The target's planes.
            num_layers: The target's layers.

        Raises:
            UnsupportedEngineError: If the target's planes differ in block size.
        """
        self._refuse_classes("target", shape)
        per_layer = shape.num_planes // num_layers
        numbers: Counter[int] = Counter()
        for runner in self._runners:
            row_bytes = _row_bytes(runner) or shape.row_bytes
            numbers[row_bytes * shape.block_tokens] += _num_layers(runner) * per_layer
        num_more = numbers.pop(shape.block_bytes, 0)
        others = (SizeClass(*each) for each in sorted(numbers.items()))
        return replace(
            shape, num_planes=shape.num_planes + num_more, others=(*shape.others, *others)
        )

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
        geometry, block_tokens = target.geometry, target.shape.block_tokens
        if shape.block_tokens != block_tokens:
            raise UnsupportedEngineError(
                f"speculative decoding: the draft's tokens of a block are {shape.block_tokens}, "
                f"the target's {block_tokens}; both lie in the same pages: {REMOVE}"
            )
        classes = {each.block_bytes: each for each in geometry.classes}
        if shape.block_bytes not in classes:
            raise UnsupportedEngineError(
                f"speculative decoding: the draft's bytes of a token in one layer are "
                f"{shape.row_bytes}, expected one of "
                f"{[each // block_tokens for each in classes]}; choose another draft, or {REMOVE}"
            )
        first_plane = self._num_placed[shape.block_bytes]
        if shape.block_bytes == target.shape.block_bytes:
            first_plane += target.shape.num_planes
        num_left = classes[shape.block_bytes].num_planes - first_plane
        if shape.num_planes > num_left:
            raise UnsupportedEngineError(
                f"speculative decoding: the draft's pool has {shape.num_planes} planes, expected "
                f"at most {num_left}; {REMOVE}"
            )
        num_rows = layer_tensors.num_rows(shape, geometry, target.arena.num_pages)
        pool.size = num_rows - shape.block_tokens
        count_blocks(pool)
        layer_tensors.lay_out(create_buffers, shape, geometry, target.arena, first_plane)
        self._num_placed[shape.block_bytes] += shape.num_planes

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


def _row_bytes(runner: Any) -> int | None:
    """Return the bytes that a draft's keys of a token have in one layer; None: as the target's."""
    model, cache_type = runner.model_config, getattr(runner, "kv_cache_dtype", None)
    if cache_type is None or model.attention_arch.name != "MHA":
        return None
    num_heads: int = model.get_num_kv_heads(num_attention_parts(runner.server_args))
    return num_heads * model.head_dim * cache_type.itemsize
