"""kvcached for SGLang, which calls `register` in each of its processes: its plugin system."""


def register() -> None:
    """Add our flags to SGLang's; hook the rest only if a flag or `ENABLE_KVCACHED` says so."""
    from kvcached_sglang.startup import add_flags, startup

    add_flags()
    startup.start()
