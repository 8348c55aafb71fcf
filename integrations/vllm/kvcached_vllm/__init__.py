"""kvcached for vLLM. vLLM calls `register` in each of its processes, through its plugin system."""

import os


def register() -> None:
    """Hook vLLM if `ENABLE_KVCACHED` says so; otherwise change nothing and import nothing."""
    if os.environ.get("ENABLE_KVCACHED", "0").strip() in ("", "0"):
        return
    from kvcached_vllm.log_lines import show_lines
    from kvcached_vllm.startup import startup

    show_lines()
    startup.start()
