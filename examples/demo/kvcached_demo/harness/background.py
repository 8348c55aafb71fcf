"""Something that goes on in a thread of its own while a block runs."""

import threading
from typing import Self


class Background:
    """A thread from the start of its block to its end; subclasses say in `_run` what it does."""

    def __init__(self) -> None:
        self._end = threading.Event()
        name = f"kvcached-{type(self).__name__.lower()}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        """Work until `_end` is set."""
        raise NotImplementedError
