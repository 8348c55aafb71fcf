"""A host copy that cannot be used: one clear line, and a copy of one's own, or none."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from helpers.weight_copies import (
    KEY,
    LAYOUT,
    WHOLE_BYTES,
    Start,
    check,
    config,
    held_bytes,
    image,
    opened,
    start,
)
from helpers.weight_pages import Pages

from kvcached_core.config import Config
from kvcached_core.units import GIB
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_bytes import HostBytes
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.host_file import SharedFile
from kvcached_core.weights.open_copy import open_copy

__all__ = ["config", "image", "opened", "start"]


def change_record(image: Path, old: str, new: str) -> None:
    record = image.with_suffix(".json")
    text = record.read_text()
    assert old in text
    record.write_text(text.replace(old, new))


def write_a_byte(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(WHOLE_BYTES - 1)
        file.write(b"?")


def cut_and_lengthen(image: Path) -> None:
    os.truncate(image, 100)
    os.truncate(image, WHOLE_BYTES)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda image: os.truncate(image, 100), "it has 100 bytes, expected are 262144"),
    "empty": (lambda image: os.truncate(image, 0), "it has 0 bytes"),
    "too long": (lambda image: os.truncate(image, 2 * WHOLE_BYTES), "it has 524288 bytes"),
    "cut and lengthened": (cut_and_lengthen, "its bytes are not those that its record is of"),
    "written to": (write_a_byte, "its bytes are not those that its record is of"),
    "no record": (lambda image: image.with_suffix(".json").unlink(), "before it was whole"),
    "record cut": (lambda image: os.truncate(image.with_suffix(".json"), 50), "cannot be read"),
    "record of nothing": (lambda image: image.with_suffix(".json").write_text("1"), "be read"),
    "other weights": (
        lambda image: change_record(image, KEY.digest, "f" * 32),
        "says key ffffffffffffffffffffffffffffffff",
    ),
    "other format": (
        lambda image: change_record(image, '"version": 2', '"version": 0'),
        "says version 0, expected is 2",
    ),
    "other pages": (
        lambda image: change_record(image, '"num_pages": 4', '"num_pages": 5'),
        "says num_pages 5, expected is 4",
    ),
    "a sum missing": (
        lambda image: change_record(image, '"checksums": [', '"checksums": [1, '),
        "has not one sum for each of 4 pages",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_copy_is_filled_again_and_said_in_one_line(
    start: Start, config: Config, image: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    start(Pages.of(1)).close()
    spoil, reason = SPOILT[how]
    spoil(image)
    caplog.clear()
    pages = Pages.of(1)
    assert start(pages).is_shared
    assert pages.copied == [0, 1, 2, 3]
    (line,) = caplog.records
    assert f"the host copy {image} is filled again: " in line.getMessage()
    assert reason in line.getMessage()
    assert held_bytes(config) == WHOLE_BYTES
    again = Pages.of(1)
    start(again)
    assert again.copied == []


@pytest.mark.parametrize("how", ["no record", "written to"])
def test_a_spoilt_copy_that_others_use_is_left_to_them(
    start: Start, config: Config, image: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    start(Pages.of(1))
    spoil, reason = SPOILT[how]
    spoil(image)
    caplog.clear()
    pages = Pages.of(1)
    assert not start(pages).is_shared
    assert pages.copied == [0, 1, 2, 3]
    (line,) = caplog.records
    assert f"not shared: {image} is in use although" in line.getMessage()
    assert reason in line.getMessage()
    assert held_bytes(config) == 2 * WHOLE_BYTES


def one_line(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = caplog.records
    return line.getMessage()


def identity(path: Path) -> tuple[int, ...]:
    """Return what shows that nobody replaced or wrote to something."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def link(image: Path) -> None:
    (image.parent / "elsewhere").touch()
    image.symlink_to(image.parent / "elsewhere")


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (Path.mkdir, "cannot be opened: Is a directory"),
        (link, "cannot be opened: Too many levels of symbolic links"),
        (os.mkfifo, "is not a file of this user"),
    ],
    ids=["folder", "link", "pipe"],
)
def test_what_stands_in_the_place_of_a_copy_is_left_and_a_private_copy_serves(
    start: Start,
    image: Path,
    plant: Callable[[Path], object],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image.parent.mkdir(mode=0o700)
    plant(image)
    planted = identity(image)
    pages = Pages.of(1)
    copy = start(pages)
    assert not copy.is_shared
    assert one_line(caplog) == f"kvcached: the host copy of llama is not shared: {image} {reason}"
    pages.content[:] = Pages.of(2).content
    assert copy.write_back(range(4), pages)
    check(copy, pages)
    copy.close()
    assert identity(image) == planted


def test_a_file_that_may_not_be_read_leaves_a_private_copy(
    start: Start, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(Pages.of(1)).close()
    real_open = os.open

    def refuse(path: Path, *args: int) -> int:
        if path == image:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real_open(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    caplog.clear()
    assert not start(Pages.of(1)).is_shared
    assert "cannot be opened: Permission denied" in one_line(caplog)


def test_a_file_of_another_user_leaves_a_private_copy(
    start: Start, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(Pages.of(1)).close()
    if os.geteuid() == 0:
        os.chown(image, 12345, -1)
    else:
        pytest.skip("only root gives files away")
    caplog.clear()
    assert not start(Pages.of(1)).is_shared
    assert "is not a file of this user" in one_line(caplog)


def test_a_folder_that_cannot_be_used_leaves_the_weights_where_they_are(
    opened: Callable[[], HostCopy | None], config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config.copies_dir.mkdir(mode=0o755)
    config.copies_dir.chmod(0o755)
    assert opened() is None
    assert one_line(caplog) == (
        "kvcached: the weights of llama stay on the device: "
        f"KVCACHED_WEIGHTS_DIR={str(config.copies_dir)!r} is open to other users (mode 0755); "
        "allowed is 0700"
    )


def test_a_budget_that_is_too_small_leaves_the_weights_where_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(weights_dir=tmp_path / "weights", host_budget=WHOLE_BYTES - 1)
    assert open_copy(config, KEY, LAYOUT, HostBudget(config, GIB)) is None
    assert one_line(caplog).startswith(
        "kvcached: the weights of llama stay on the device: llama needs 256 KiB of host memory"
    )
    assert [path.name for path in config.copies_dir.iterdir()] == ["budget.lock"]


def fail(number: int) -> Callable[..., None]:
    def raise_it(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_it


@pytest.mark.parametrize(
    "full",
    [(os, "ftruncate"), (os, "posix_fallocate"), (SharedFile, "allocate")],
    ids=["length", "reserve", "room"],
)
def test_a_full_disk_leaves_a_private_copy(
    start: Start,
    image: Path,
    full: tuple[object, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(*full, fail(errno.ENOSPC))
    pages = Pages.of(1)
    assert not start(pages).is_shared
    assert one_line(caplog) == (
        f"kvcached: the host copy of llama is not shared: {image.parent} has no room for 256 KiB: "
        "No space left on device; Docker: raise --shm-size"
    )
    assert [path.suffix for path in sorted(image.parent.iterdir())] == [".claim", ".lock"]


def test_room_that_is_not_there_is_not_taken_from_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = os.fstatvfs

    class Small:
        f_frsize, f_bavail = 4096, WHOLE_BYTES // 4096 - 1

    taken: list[int] = []
    lengthen = os.ftruncate
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: (taken.append(size), lengthen(fd, size)))
    monkeypatch.setattr(os, "fstatvfs", lambda _: Small)
    assert not start(Pages.of(1)).is_shared
    assert taken == []
    monkeypatch.setattr(os, "fstatvfs", around)
    assert start(Pages.of(1)).is_shared
    assert taken == [WHOLE_BYTES]


def test_an_error_that_is_none_of_room_is_said_as_it_is(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "ftruncate", fail(errno.EIO))
    assert not start(Pages.of(1)).is_shared
    assert one_line(caplog).endswith("/weights cannot be used: Input/output error")


def test_a_host_without_memory_leaves_the_weights_where_they_are(
    opened: Callable[[], HostCopy | None],
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(HostBytes, "touch", fail(errno.ENOMEM))
    assert opened() is None
    line = one_line(caplog)
    assert line.startswith("kvcached: the weights of llama stay on the device: ")
    assert line.endswith("no 256 KiB for a copy of this process: Cannot allocate memory")
    assert held_bytes(config) == 0


def test_a_record_that_cannot_be_written_leaves_the_copy_to_who_filled_it(
    start: Start,
    config: Config,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail(errno.ENOSPC))
        copy = start(Pages.of(1))
    assert not copy.is_shared
    assert "cannot be shared: No space left on device" in one_line(caplog)
    assert not image.exists()
    assert held_bytes(config) == WHOLE_BYTES
    assert start(Pages.of(1)).is_shared
    check(copy, Pages.of(1))


def test_a_file_that_was_removed_while_it_was_filled_serves_who_filled_it(
    opened: Callable[[], HostCopy | None],
    start: Start,
    config: Config,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy, pages = opened(), Pages.of(1)
    assert copy is not None
    shutil.rmtree(config.copies_dir)
    second = start(Pages.of(1))
    assert copy.fill(pages, Event())
    assert not copy.is_shared
    assert "cannot be shared: somebody removed it" in one_line(caplog)
    check(copy, pages)
    copy.close()
    check(second, pages)
    again = Pages.of(1)
    start(again)
    assert again.copied == []


TESTS = Path(__file__).parents[2]
FULL = """
import logging, sys, threading
from pathlib import Path
from helpers.weight_copies import KEY, LAYOUT, check
from helpers.weight_pages import Pages, Pins
from kvcached_core.config import Config
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_copy import complete
from kvcached_core.weights.host_file import SharedFile
from kvcached_core.weights.open_copy import open_copy
logging.basicConfig(level="WARNING", format="%(message)s", stream=sys.stdout)
if sys.argv[2] == "late":  # somebody else takes the room after we looked
    allocate = SharedFile.allocate
    SharedFile.allocate = lambda file: (allocate(file), Path(sys.argv[1], "x").write_bytes(
        bytes(400 * 1024)))
config = Config(weights_dir=Path(sys.argv[1]) / "weights", host_budget=2**30)
pages = Pages.of(1)
copy = open_copy(config, KEY, LAYOUT, HostBudget(config))
assert copy is not None and not copy.is_shared
complete(copy, Pins(), pages, threading.Event())
check(copy, pages)
print(sorted(path.name for path in config.copies_dir.iterdir() if path.suffix != ".claim"))
"""


@pytest.mark.parametrize(("size", "when"), [("200k", "early"), ("512k", "late")])
def test_memory_that_is_really_full_is_an_error_and_no_signal(
    tmp_path: Path, size: str, when: str
) -> None:
    mount = f"mount -t tmpfs -o size={size},mode=700 tmpfs {tmp_path} && exec "
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount + '"$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL, str(tmp_path), when],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line, left = done.stdout.splitlines()
    assert "has no room for 256 KiB: No space left on device" in line
    assert left == "['budget.lock']"
