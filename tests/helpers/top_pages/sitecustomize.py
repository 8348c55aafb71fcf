"""On a process's path it makes SGLang hand out the pages at the top of its reservation.

There a kernel with 32-bit arithmetic would go wrong. Only for tests.
"""

import os
import sys
from typing import Any

NUM_PAGES = 1024

if "launch_server" in " ".join(sys.orig_argv) or "multiprocessing" in " ".join(sys.orig_argv):
    from kvcached_core.engine.page_book import PageBook

    make = PageBook.__init__

    def make_and_keep_the_top(self: Any, num_pages: int, *args: Any, **kwargs: Any) -> None:
        make(self, num_pages, *args, **kwargs)
        self._unmapped = [page for page in self._unmapped if page >= num_pages - NUM_PAGES]

    if os.environ.get("ENABLE_KVCACHED", "0") != "0" or "--enable-kvcached" in sys.orig_argv:
        PageBook.__init__ = make_and_keep_the_top  # type: ignore[method-assign]
