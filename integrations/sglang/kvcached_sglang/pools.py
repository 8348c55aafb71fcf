"""Which of SGLang's KV pools can lie on our arena."""

from kvcached_sglang.startup import startup

SERVED_POOLS = frozenset(
    {"MHATokenToKVPool", "MLATokenToKVPool", "HybridLinearKVPool", "SWAKVPool"}
)


def check_class(pool: type) -> None:
    """End the process unless a pool of this class holds keys and values alone, as we lay them out.

    SGLang catches exceptions where it makes its pools, and this is no error of its own.
    """
    if pool.__name__ not in SERVED_POOLS:
        startup.end(
            f"SGLang would keep this model's KV cache in a {pool.__name__}, which cannot "
            f"be elastic; {', '.join(sorted(SERVED_POOLS))} can be. Start without "
            "--enable-kvcached and with ENABLE_KVCACHED=0"
        )
