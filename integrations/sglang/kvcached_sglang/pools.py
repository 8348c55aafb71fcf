"""Which of SGLang's KV pools can lie on our arena."""

from typing import Any

from kvcached_sglang.startup import startup

SERVED_POOLS = frozenset(
    {
        "DSATokenToKVPool",
        "MHATokenToKVPool",
        "MHATokenToKVPoolMXFP8",
        "MLATokenToKVPool",
        "HybridLinearKVPool",
        "SWAKVPool",
    }
)


def check_class(pool: type) -> None:
    """End the process unless all that a pool of this class has of a block lies in our pages.

    Those of four bits read all of their blocks in every step, mapped or not.

    SGLang catches exceptions where it makes its pools, and this is no error of its own.
    """
    if pool.__name__ not in SERVED_POOLS:
        startup.end(
            f"SGLang would keep this model's KV cache in a {pool.__name__}, which cannot "
            f"be elastic; {', '.join(sorted(SERVED_POOLS))} can be. Start without "
            "--enable-kvcached and with ENABLE_KVCACHED=0"
        )


def count_blocks(pool: Any) -> None:
    """Tell a pool of another length how many blocks it has, if it keeps their number."""
    if getattr(pool, "use_hnd", False):
        pool.num_pages = pool.size // pool.page_size + 1
