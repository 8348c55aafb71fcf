"""What people are told of the disk that images of weights go to: room, images, speed, moves."""

from collections.abc import Iterator
from pathlib import Path

from kvcached_core.cli.disk_tiers import read_speed, speed_text
from kvcached_core.config import Config
from kvcached_core.errors import KVCachedError
from kvcached_core.units import format_bytes
from kvcached_core.weights.disk_survey import DiskSurvey, read_images, survey_disk


def examine_image_disk(folder: Path, config: Config) -> tuple[bool, str]:
    """Return whether images of weights can go to a folder, and a text.

    Images that lie there are read for about a second, to say how fast the disk is.

    Args:
        folder: The folder; it may be missing.
        config: The settings.
    """
    try:
        found = survey_disk(folder, config)
    except KVCachedError as error:
        return False, str(error)
    if found.room_bytes <= 0:
        return False, (
            f"{folder} has no room above KVCACHED_WEIGHTS_DISK_FREE={config.weights_disk_free}; "
            "images that go there take the place of others, and where none may go, they stay in "
            "memory"
        )
    return True, "; ".join(_parts(folder, found))


def _parts(folder: Path, found: DiskSurvey) -> Iterator[str]:
    yield f"{folder}, room for {format_bytes(found.room_bytes)}"
    if found.is_direct:
        yield "O_DIRECT works"
    else:
        yield "it knows no O_DIRECT, so images go through the page cache, slower"
    images = read_images(folder)
    if images.holders:
        yield f"{len(images.holders)} images of {format_bytes(images.num_bytes)}"
    speed = read_speed(folder)
    if speed is not None:
        yield f"reads {speed_text(speed)}"
    moves = images.moves
    if moves.num_read:
        yield f"{moves.num_read} came back at {speed_text(moves.read_bytes / moves.read_seconds)}"
    if moves.num_spoiled:
        yield f"{moves.num_spoiled} were spoiled and removed"
