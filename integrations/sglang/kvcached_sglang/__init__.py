"""kvcached for SGLang, which calls `register` in each of its processes: its plugin system."""


def register() -> None:
    """Add our flags to SGLang's; hook the rest only if a flag or `ENABLE_KVCACHED` says so."""
    from kvcached_sglang.startup import add_flags, start

    add_flags()
    start()
