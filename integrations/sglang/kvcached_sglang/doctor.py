"""What `kvcached doctor` says of SGLang."""

from collections.abc import Iterator

from kvcached_patches import doctor_findings
from kvcached_patches import sglang as table


def findings() -> Iterator[tuple[bool, str]]:
    """Yield whether it is good, and a text, for everything we look at."""
    return doctor_findings(
        "SGLang",
        table.OLDEST_RELEASES,
        table.PACKAGE,
        table.LOCKED,
        "SGLANG_PLUGINS",
    )
