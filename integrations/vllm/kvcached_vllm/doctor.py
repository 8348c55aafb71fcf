"""What `kvcached doctor` says of vLLM."""

import os
from collections.abc import Iterator

from kvcached_core.errors import UnsupportedEngineError
from kvcached_vllm.startup import check_release, installed_release

PLUGIN = "kvcached"


def findings() -> Iterator[tuple[bool, str]]:
    """Yield whether it is good, and a text, for everything we look at."""
    try:
        release = installed_release()
    except UnsupportedEngineError:
        yield True, "not installed here"
        return
    try:
        check_release(release)
    except UnsupportedEngineError as error:
        yield False, str(error)
    else:
        yield True, f"{release}, every hook fits"
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        yield (
            False,
            f"VLLM_PLUGINS={plugins!r} keeps kvcached out; add {PLUGIN} to it or unset it",
        )
