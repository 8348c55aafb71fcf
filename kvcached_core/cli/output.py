"""What a command prints: where it cannot be written, one line says so and no traceback."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_FAILED = 1
# What is said of a file, or a terminal, that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def printing(program: str) -> Iterator[None]:
    """Have written what a block prints; where that fails, end the process with 1.

    Why is said in one line. A pipe whose reader has left ends it without a word.

    Args:
        program: What the line begins with.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # somebody may have closed it
                sys.stdout.flush()
    except OSError as error:
        # What is said of a file by its name is not about what was printed.
        if error.errno not in (errno.EPIPE, *FULL) or error.filename is not None:
            raise
        # Python would try again at the end, and complain in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(EXIT_FAILED)
        sys.exit(f"{program}: what it prints cannot be written: {error.strerror}")
