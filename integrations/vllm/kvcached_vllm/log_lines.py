"""Our log lines in vLLM's log, which shows those of its own loggers alone."""

import logging

OURS, ENGINES = "kvcached", "vllm"


class EngineLog(logging.Handler):
    """Hands lines to vLLM's logger, if that shows lines of their level by then.

    A process may say only after its plugins were loaded what that logger shows, and where.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one line over."""
        engines = logging.getLogger(ENGINES)
        if engines.isEnabledFor(record.levelno):
            engines.handle(record)


def show_lines() -> None:
    """Let our lines go where vLLM's go, unless somebody has said already where they go."""
    ours = logging.getLogger(OURS)
    if ours.hasHandlers():
        return
    ours.addHandler(EngineLog())
    ours.propagate = False
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)  # the root logger's would let warnings through alone
