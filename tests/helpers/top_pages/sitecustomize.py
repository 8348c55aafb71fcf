"""On a process's path it makes SGLang hand out the pages at the top of its reservation.

There a kernel with 32-bit arithmetic would go wrong. Only for tests.
"""

import os
import sys
from typing import Any

NUM_PAGES = 1024

if "launch_server" in " ".join(sys.orig_argv) or "multiprocessing" in " ".join(sys.orig_argv):
    from kvcached_sglang.blocks import BlockPages

    make = BlockPages.__init__

    def make_and_keep_the_top(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self._unmapped = [page for page in self._unmapped if page >= self.num_pages - NUM_PAGES]

    if os.environ.get("ENABLE_KVCACHED", "0") != "0" or "--enable-kvcached" in sys.orig_argv:
        BlockPages.__init__ = make_and_keep_the_top  # type: ignore[method-assign]
