"""What images of weights find on the disk that is set for them."""

from dataclasses import dataclass
from pathlib import Path

from kvcached_core.config import PREFIX, Config
from kvcached_core.errors import HostCopyError
from kvcached_core.weights.copies_folder import Holder, check_folder, read_holders
from kvcached_core.weights.direct_file import knows_direct
from kvcached_core.weights.disk_store import SETTING, room_bytes
from kvcached_core.weights.moves import Moves, read_moves


@dataclass(frozen=True)
class DiskSurvey:
    """What there is.

    Attributes:
        room_bytes: What may go there still.
        is_direct: Whether files there are read beside the page cache.
    """

    room_bytes: int
    is_direct: bool


@dataclass(frozen=True)
class DiskImages:
    """The images of a folder.

    Attributes:
        holders: Who they are of.
        moves: What was moved there and back.
    """

    holders: list[Holder]
    moves: Moves

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(held.num_bytes for held in self.holders)


def survey_disk(folder: Path, config: Config) -> DiskSurvey:
    """Return what images would find in a folder, which may be missing; nothing is left there.

    Raises:
        HostCopyError: If it cannot be used.
    """
    place = check_folder(folder, SETTING)
    try:
        return DiskSurvey(room_bytes(place, config), knows_direct(place))
    except OSError as error:
        raise HostCopyError(
            f"{PREFIX}{SETTING}={str(folder)!r} cannot be used: {error.strerror}"
        ) from error


def read_images(folder: Path) -> DiskImages:
    """Return the images of a folder; nothing is waited for."""
    return DiskImages(read_holders(folder), read_moves(folder))
