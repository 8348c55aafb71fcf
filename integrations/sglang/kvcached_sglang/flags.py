"""Where our flags come among SGLang's, and what follows when all arguments are known."""

import argparse
from typing import Any

from kvcached_core.engine.flags import add_flags, take_flags
from kvcached_sglang.startup import check_arguments, startup

ENCODES_ONLY = (
    "kvcached: nothing of this server is elastic: it only encodes (--encoder-only) and has no KV "
    "cache; its weights stay, and no ledger counts its memory"
)


def server_args_add_cli_args(original: Any) -> Any:
    """Wrap `ServerArgs.add_cli_args`, a static method."""
    add = original.__func__

    def wrapper(parser: argparse.ArgumentParser) -> None:
        add(parser)
        add_flags(parser)

    return staticmethod(wrapper)


def server_args_from_cli_args(original: Any) -> Any:
    """Wrap `ServerArgs.from_cli_args`, a class method: all is known, and nothing done yet."""
    build = original.__func__

    def wrapper(cls: type, args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        take(args)
        return build(cls, args, *rest, **kwargs)

    return classmethod(wrapper)


def take(arguments: argparse.Namespace) -> None:
    """Set the variables that the flags stand for, hook SGLang, and refuse what cannot be served.

    Raises:
        SystemExit: With one message: a flag without the switch, a bad value, what cannot be served.
    """
    take_flags(arguments)
    startup.start()
    check_arguments(arguments)
    if startup.is_on and getattr(arguments, "encoder_only", False):
        startup.logger.warning(ENCODES_ONLY)
