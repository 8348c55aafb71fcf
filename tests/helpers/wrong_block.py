"""Has SGLang's schedulers read what is another's in one block of each request, where a test wants.

It shows that tokens tell a block that is not the request's own. Nothing of SGLang is imported
before it calls us.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from helpers.engine_plugin import add_plugin

VARIABLE = "WRONG_BLOCK"


def wrong_block_variables(folder: Path) -> dict[str, str]:
    """Return the variables of a server that reads wrong blocks inside of `wrong_blocks`."""
    return {VARIABLE: str(folder / "wrong"), **add_plugin(folder, __name__)}


@contextmanager
def wrong_blocks(folder: Path) -> Iterator[None]:
    """Let each request's first block be wrong; no request that had it may be asked again."""
    (folder / "wrong").touch()
    try:
        yield
    finally:
        (folder / "wrong").unlink()


def register() -> None:
    """Look at each batch before it runs."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    ModelRunner.forward = _with_wrong_blocks(ModelRunner.forward)


def _with_wrong_blocks(original: Any) -> Any:
    @wraps(original)
    def wrapper(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(os.environ[VARIABLE]).exists() and forward_batch.forward_mode.is_decode():
            table = self.req_to_token_pool.req_to_token
            for row in forward_batch.req_pool_indices.tolist():
                first, other = table[row, :2].tolist()
                pool = self.token_to_kv_pool
                pool = getattr(pool, "full_kv_pool", pool)  # of all layers, or of some
                for plane in (*pool.k_buffer, *pool.v_buffer):
                    plane[first] = plane[other]
        return original(self, forward_batch, *args, **kwargs)

    return wrapper
