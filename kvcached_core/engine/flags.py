"""Our settings as flags among an engine's own: they set variables, which its processes inherit.

They are plain flags, so that an engine's configuration file may have them, and nothing happens
before all arguments are known: their order says nothing.
"""

import argparse
import os

from kvcached_core.config import SWITCH, Enable, read_switch
from kvcached_core.errors import ConfigError

SWITCH_FLAG = "--enable-kvcached"
FLAGS = {
    "--kvcached-limit": ("KVCACHED_LIMIT", "The most it may hold: 24GiB, 50%% or none."),
    "--kvcached-floor": ("KVCACHED_FLOOR", "What it can always get back, such as 8GiB."),
    "--kvcached-priority": ("KVCACHED_PRIORITY", "-1000 to 1000; the lowest gives first."),
    "--kvcached-name": ("KVCACHED_NAME", "The instance's name in `kvcached top`."),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the switch and its companions to an engine's arguments, in a group of their own."""
    group = parser.add_argument_group("kvcached")
    group.add_argument(
        SWITCH_FLAG,
        action="store_true",
        help="Share KV memory elastically with other engines on the device.",
    )
    for flag, (_, text) in FLAGS.items():
        group.add_argument(flag, help=text)


def take_flags(arguments: argparse.Namespace) -> None:
    """Set the variables that the flags stand for.

    Raises:
        SystemExit: With one message: a flag without the switch, or a bad value of the switch.
    """
    values = {flag: getattr(arguments, _destination(flag), None) for flag in FLAGS}
    given = {flag: str(value) for flag, value in values.items() if value is not None}
    try:
        is_off = read_switch() is Enable.OFF
    except ConfigError as error:
        raise SystemExit(f"kvcached: {error}") from error
    if getattr(arguments, _destination(SWITCH_FLAG), False):
        if is_off:
            os.environ[SWITCH] = "1"
    elif given and is_off:
        raise SystemExit(
            f"kvcached: {', '.join(given)} would do nothing; add {SWITCH_FLAG}, "
            f"set {SWITCH}=1, or remove it"
        )
    for flag, value in given.items():
        os.environ[FLAGS[flag][0]] = value


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
