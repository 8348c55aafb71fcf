"""The images of weights on the disk that the settings here name."""

from kvcached_core.config import read_config
from kvcached_core.errors import KVCachedError
from kvcached_core.weights.disk_survey import DiskImages, read_images


def disk_images() -> DiskImages | None:
    """Return them; None where no disk is set, or settings are wrong."""
    try:
        folder = read_config().weights_disk
    except KVCachedError:
        return None
    return None if folder is None else read_images(folder)
