"""What `kvcached doctor` says of vLLM."""

from collections.abc import Iterator

from kvcached_patches import doctor_findings
from kvcached_patches import vllm as table


def findings() -> Iterator[tuple[bool, str]]:
    """Yield whether it is good, and a text, for everything we look at."""
    return doctor_findings(
        "vLLM", table.OLDEST_RELEASES, table.PACKAGE, table.LOCKED, "VLLM_PLUGINS"
    )
