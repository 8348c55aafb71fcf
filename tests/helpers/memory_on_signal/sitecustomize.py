"""On a process's path it lets SIGUSR2 write what torch holds there to the file `MEMORY_REPORT`.

SGLang has no call that reaches a worker and leaves its weights where they are. Only for tests.
"""

import os
import signal
import threading
from pathlib import Path
from typing import Any


def _report(*_: Any) -> None:
    from helpers.residue import write

    path = Path(os.environ["MEMORY_REPORT"])
    threading.Thread(target=write, args=(path,), daemon=True).start()


if "MEMORY_REPORT" in os.environ:
    signal.signal(signal.SIGUSR2, _report)
