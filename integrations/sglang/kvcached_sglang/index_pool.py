"""SGLang's pool of sparse attention: the index of each layer lies in pages beside its latents."""

import inspect
from contextvars import ContextVar
from typing import Any

from kvcached_core.memory import layer_tensors
from kvcached_patches.around import around, setting
from kvcached_sglang import pools
from kvcached_sglang.engine import engine
from kvcached_sglang.speculating import REMOVE
from kvcached_sglang.startup import startup

# Whether the planes that a pool makes are laid out by who makes the whole pool.
is_laid_out: ContextVar[bool] = ContextVar("kvcached_is_laid_out", default=False)


@around
def sparse_attention_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `DSATokenToKVPool.__init__`: a pool is made twice, of nothing, and as long as the ids.

    It makes the planes of its index, a row for each block, when it has those of its latents.
    """
    ours = engine()
    if ours is None or ours.has_all_pools:
        original(self, *args, **kwargs)
        return
    if ours.drafts.is_expected:
        startup.end(f"a draft with sparse attention cannot be elastic; {REMOVE}")
    pools.check_class(type(self))
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    size, page_size = given["size"], given["page_size"]
    if given.get("index_buf_size") not in (None, size):
        startup.end("an index of sparse attention with a size of its own cannot be elastic")

    def make(pool: Any, num_tokens: int) -> None:
        original(**{**given, "self": pool, "size": num_tokens, "index_buf_size": None})

    with setting(is_laid_out, value=True), startup.one_message():
        probe = object.__new__(type(self))
        num_rows = -(-size // page_size) * page_size + page_size
        shape = layer_tensors.measure(
            lambda: make(probe, num_rows - page_size), num_rows, page_size
        )
        geometry, arena = ours.place_pool(shape, given["layer_num"])
        num_rows = layer_tensors.num_rows(shape, geometry, arena.num_pages)
        layer_tensors.lay_out(lambda: make(self, num_rows - page_size), shape, geometry, arena)
    self.kvcached = geometry
