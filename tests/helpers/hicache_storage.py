"""A storage of HiCache that a user names by its class: blocks in files, as SGLang's own `file`."""

from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheFile


class NamedStorage(HiCacheFile):  # type: ignore[misc]
    """What SGLang makes of a class that it is told of.

    Args:
        storage_config: What SGLang says of the server.
    """

    def __init__(self, storage_config: Any, _more: Any) -> None:
        super().__init__(storage_config)
