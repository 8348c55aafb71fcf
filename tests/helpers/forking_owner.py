"""Run as a script: forks over and over while a thread of it works on a ledger.

    python forking_owner.py LEDGER NUM_FORKS

It is a process of its own because it is a small one: to fork one that has imported an engine takes
many times as long.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.units import MIB

PAGE = 16 * MIB
CAPACITY = 64 * PAGE


def close_what_it_believes_to_have(ledger: Ledger, row: RowKey) -> None:
    """End a child as a script would that owns a row, and does not."""
    signal.alarm(60)
    try:
        ledger.unregister(row)
    except LedgerError:
        ledger.close()
        os._exit(0)
    os._exit(1)


def main() -> None:
    """Fork, and say by the exit code whether all was left as it was."""
    path, num_forks = Path(sys.argv[1]), int(sys.argv[2])
    with Ledger(path, CAPACITY) as ledger:
        row = ledger.register(name="parent", engine="test")
        neighbour = ledger.register(name="neighbour", engine="test")
        source, end = random.Random(1), threading.Event()

        def work() -> None:
            while not end.is_set():
                granted = ledger.promise(row, 8 * PAGE, PAGE)
                ledger.settle(row, mapped_bytes=granted, used_bytes=granted, cached_bytes=0)
                ledger.settle(row, unmapped_bytes=granted, used_bytes=0, cached_bytes=0)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(num_forks):
                for _ in range(source.randrange(20)):
                    ledger.room_bytes(neighbour)
                pid = os.fork()
                if pid == 0:
                    close_what_it_believes_to_have(ledger, row)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            end.set()
            worker.join()
        seen = {view.name: view for view in ledger.view().instances}
        assert set(seen) == {"parent", "neighbour"}
        assert (seen["parent"].resident_bytes, seen["parent"].promised_bytes) == (0, 0)
        assert ledger.promise(neighbour, CAPACITY, PAGE) == CAPACITY


if __name__ == "__main__":
    main()
