"""Whose a folder is: what processes of ours share there, nobody else may read or change."""

import os
import stat
from pathlib import Path


def foreign(setting: str, folder: Path, found: os.stat_result) -> str:
    """Return why a folder is not this user's alone, and what to do; nothing if it is.

    Args:
        setting: What names it, without the prefix of all settings.
        folder: The folder.
        found: What `lstat` says of it.
    """
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return (
            f"KVCACHED_{setting}={str(folder)!r} is not a folder of this user (it belongs to user "
            f"{found.st_uid}); set KVCACHED_{setting} to a folder of this user's own"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        return (
            f"KVCACHED_{setting}={str(folder)!r} is open to other users (mode {mode:04o}); "
            "allowed is 0700"
        )
    return ""
