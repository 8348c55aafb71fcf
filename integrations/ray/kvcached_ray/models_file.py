"""The file of models as the cluster has it: read on the head node, served by every node."""

from contextlib import suppress
from pathlib import Path

from kvcached_core.errors import ConfigError
from kvcached_gateway.settings.files import read_own

__all__ = ["ModelsFile"]


class ModelsFile:
    """The text of a file of models, and the one that is to take its place.

    Args:
        path: The file.
        text: What was in it when the application was deployed, perhaps on another machine.

    Attributes:
        text: What nodes serve.
        new: What they are asked to serve; the same where nothing was read since.
    """

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self.text = text
        with suppress(ConfigError):  # it may lie on the machine that deployed alone
            self.text = read_own(path)
        self.new = self.text

    def read(self) -> None:
        """Read the file again, into `new`.

        Raises:
            ConfigError: If it is not on this machine, or others may write it.
        """
        self.new = read_own(self._path)

    def settle(self, *, is_taken: bool) -> None:
        """Go by the new text, or by the one of before."""
        if is_taken:
            self.text = self.new
        else:
            self.new = self.text
