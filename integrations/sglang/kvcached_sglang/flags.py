"""Our flags among SGLang's: each sets a variable, which all processes of the server inherit."""

import argparse
import os
from typing import Any

from kvcached_sglang import startup

FLAGS = {
    "--kvcached-limit": ("KVCACHED_LIMIT", "The most it may hold: 24GiB, 50%% or none."),
    "--kvcached-floor": ("KVCACHED_FLOOR", "What it can always get back, such as 8GiB."),
    "--kvcached-priority": ("KVCACHED_PRIORITY", "-1000 to 1000; who has a lower one gives first."),
    "--kvcached-name": ("KVCACHED_NAME", "The instance's name in `kvcached top`."),
}


class SetVariable(argparse.Action):
    """Sets the environment variable `const` to the flag's value."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        _option: str | None = None,
    ) -> None:
        """See argparse."""
        os.environ[str(self.const)] = str(values)
        setattr(namespace, self.dest, values)


class SwitchOn(argparse.Action):
    """Switches kvcached on in this process and in those that it starts."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        _values: Any,
        _option: str | None = None,
    ) -> None:
        """See argparse."""
        setattr(namespace, self.dest, True)
        os.environ.setdefault("ENABLE_KVCACHED", "1")
        if os.environ["ENABLE_KVCACHED"].strip() in ("", "0"):
            os.environ["ENABLE_KVCACHED"] = "1"
        startup.start()


def server_args_add_cli_args(original: Any) -> Any:
    """Wrap `ServerArgs.add_cli_args`, a static method."""
    add = original.__func__

    def wrapper(parser: argparse.ArgumentParser) -> None:
        add(parser)
        group = parser.add_argument_group("kvcached")
        group.add_argument(
            "--enable-kvcached",
            action=SwitchOn,
            nargs=0,
            default=False,
            help="Share KV memory elastically with other engines on the device.",
        )
        for flag, (variable, text) in FLAGS.items():
            group.add_argument(flag, action=SetVariable, const=variable, help=text)

    return staticmethod(wrapper)
