"""Images that go to a disk and come back: what is whole stays whole, and what is not is refused."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from helpers.forked import exit_code_of_child
from helpers.weight_copies import (
    KEY,
    LAYOUT,
    OTHER_KEY,
    WHOLE_BYTES,
    Start,
    check,
    contents,
    held_bytes,
    image,
    opened,
    start,
)
from helpers.weight_pages import PAGE_BYTES, Pages

from kvcached_core.config import Config
from kvcached_core.errors import HostBudgetError
from kvcached_core.units import GIB
from kvcached_core.weights import direct_file, disk_store
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.direct_file import DirectFile
from kvcached_core.weights.disk_store import DiskStore
from kvcached_core.weights.host_bytes import HostBytes
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.kept import find_kept
from kvcached_core.weights.key import CopyKey, Loaded
from kvcached_core.weights.moves import read_moves
from kvcached_core.weights.open_copy import open_copy, open_kept
from kvcached_core.weights.record import Shape

__all__ = ["image", "opened", "start"]

LLAMA, QWEN = Pages.of(1), Pages.of(2)
Opened = Callable[..., HostCopy | None]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Settings with host memory for one image, and a disk for all."""
    return Config(
        weights_dir=tmp_path / "weights",
        weights_disk=tmp_path / "disk",
        weights_disk_free=0,
        host_budget=WHOLE_BYTES,
    )


@pytest.fixture
def disk(config: Config) -> Path:
    assert config.weights_disk is not None
    return config.weights_disk


def names(folder: Path) -> list[str]:
    return sorted(holder.name for holder in read_holders(folder))


def moved_out(start: Start) -> None:
    """Have llama's image on the disk, and qwen's in host memory, used by nobody."""
    start(LLAMA).close()
    start(QWEN, OTHER_KEY).close()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)
        file.seek(offset)
        file.write(bytes([before[0] ^ 1]))


def test_an_image_without_room_goes_to_the_disk_and_comes_back(
    start: Start, opened: Opened, config: Config, disk: Path
) -> None:
    moved_out(start)
    assert (names(config.copies_dir), names(disk)) == (["qwen"], ["llama"])
    assert held_bytes(config) == WHOLE_BYTES
    copy = opened()
    assert copy is not None
    check(copy, LLAMA)
    assert copy.is_shared
    assert names(disk) == ["llama", "qwen"]
    moves = read_moves(disk)
    assert (moves.num_written, moves.written_bytes) == (2, 2 * WHOLE_BYTES)
    assert (moves.num_read, moves.read_bytes) == (1, WHOLE_BYTES)
    assert moves.write_seconds > 0 < moves.read_seconds


def test_what_the_disk_has_already_is_not_written_again(
    start: Start, opened: Opened, config: Config, disk: Path
) -> None:
    moved_out(start)
    for key in (KEY, OTHER_KEY, KEY):
        copy = opened(key)
        assert copy is not None
        copy.close()
    assert read_moves(disk).num_written == 2
    assert read_moves(disk).num_read == 3
    assert (names(config.copies_dir), names(disk)) == (["llama"], ["llama", "qwen"])


def test_an_image_that_was_used_last_stays(tmp_path: Path, disk: Path, opened: Opened) -> None:
    config = Config(
        weights_dir=tmp_path / "weights",
        weights_disk=disk,
        weights_disk_free=0,
        host_budget=2 * WHOLE_BYTES,
    )
    for number, name in enumerate(("first", "second", "third")):
        copy = open_copy(config, CopyKey(f"{number}" * 32, name), LAYOUT, make_budget(config, GIB))
        assert copy is not None
        assert copy.fill(LLAMA, Event())
        copy.close()
        os.utime(config.copies_dir / f"{str(number) * 32}.json", ns=(number, number))
    assert (names(config.copies_dir), names(disk)) == (["second", "third"], ["first"])


def test_an_image_in_use_does_not_go(start: Start, opened: Opened, disk: Path) -> None:
    copy = start(LLAMA)
    assert opened(OTHER_KEY) is None
    check(copy, LLAMA)
    assert not disk.exists() or names(disk) == []


@pytest.mark.parametrize("page", [0, 3])
def test_one_flipped_byte_is_found_and_its_image_is_removed(
    start: Start, opened: Opened, disk: Path, caplog: pytest.LogCaptureFixture, page: int
) -> None:
    moved_out(start)
    flip(disk / f"{KEY.digest}.image", page * PAGE_BYTES + 17)
    copy = opened()
    assert copy is not None
    assert copy.sums == [None] * LAYOUT.num_pages  # it has to be filled
    assert "1 of 4 pages are not those that its record is of" in caplog.text
    assert names(disk) == ["qwen"]
    assert read_moves(disk).num_spoiled == 1
    assert read_moves(disk).num_read == 0


@pytest.mark.parametrize("spoil", ["cut", "no record", "other record"])
def test_an_image_that_is_not_whole_is_not_read(
    start: Start, opened: Opened, disk: Path, spoil: str
) -> None:
    moved_out(start)
    path = disk / f"{KEY.digest}.image"
    if spoil == "cut":
        os.truncate(path, WHOLE_BYTES - PAGE_BYTES)
    elif spoil == "no record":
        path.with_suffix(".json").unlink()
    else:
        shutil.copy(disk.parent / "weights" / f"{OTHER_KEY.digest}.json", path.with_suffix(".json"))
    copy = opened()
    assert copy is not None
    assert not copy.is_complete
    assert read_moves(disk).num_read == 0


def test_without_room_on_the_disk_the_image_stays_and_the_newcomer_is_told_who_has_what(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start(LLAMA).close()
    config = Config(
        weights_dir=tmp_path / "weights",
        weights_disk=tmp_path / "disk",
        weights_disk_free="100%",
        host_budget=WHOLE_BYTES,
    )
    with pytest.raises(HostBudgetError) as caught:
        make_budget(config, GIB).claim("qwen", 1)
    said = str(caught.value)
    assert "llama 256 KiB is in use; " in said
    assert "has no room for 256 KiB of llama: 0 B are left above" in said
    assert "KVCACHED_WEIGHTS_DISK_FREE of 100%; images there: none" in said
    assert "llama stays in host memory" in caplog.text
    assert names(config.copies_dir) == ["llama"]
    assert list((tmp_path / "disk").glob("*.part")) == []


def test_images_on_the_disk_that_nobody_has_open_give_way_oldest_first(
    start: Start, config: Config, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_out(start)
    store = DiskStore(disk, config)
    shape = Shape(OTHER_KEY, LAYOUT.page_bytes, LAYOUT.num_pages)
    monkeypatch.setattr(disk_store, "room_bytes", lambda *_: 0)
    with store._part(shape):
        assert names(disk) == []


def test_nothing_is_removed_from_the_disk_where_that_is_not_enough(
    start: Start, config: Config, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_out(start)
    monkeypatch.setattr(disk_store, "room_bytes", lambda *_: -WHOLE_BYTES)
    with pytest.raises(HostBudgetError, match="images there: llama 256 KiB; free some"):
        make_budget(config, GIB).claim("gemma", 1)
    assert (names(config.copies_dir), names(disk)) == (["qwen"], ["llama"])


def test_an_image_that_is_read_is_not_removed_for_another(
    start: Start, opened: Opened, config: Config, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_out(start)  # to bring llama back, qwen has to go where llama is
    monkeypatch.setattr(disk_store, "room_bytes", lambda *_: 0)
    assert opened() is None
    assert (names(config.copies_dir), names(disk)) == (["qwen"], ["llama"])


def fails(code: int) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "is full"), (errno.EIO, "fails: Input/output error")]
)
def test_a_disk_that_fails_leaves_the_image_in_memory(
    start: Start,
    config: Config,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    code: int,
    text: str,
) -> None:
    start(LLAMA).close()
    monkeypatch.setattr(os, "pwritev", fails(code))
    with pytest.raises(HostBudgetError, match=f"{text}; the image of llama stays in memory"):
        make_budget(config, GIB).claim("qwen", WHOLE_BYTES)
    assert (names(config.copies_dir), names(disk)) == (["llama"], [])
    assert list(disk.glob("*.part")) == []


def test_a_disk_that_cannot_be_read_is_not_waited_for(
    start: Start,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    moved_out(start)
    monkeypatch.setattr(os, "preadv", fails(errno.EIO))
    copy = opened()
    assert copy is not None
    assert not copy.is_complete
    assert "the image of llama is not used: " in caplog.text
    assert "cannot be read: Input/output error" in caplog.text


KILLED_AT: dict[str, tuple[object, str]] = {
    "a block": (os, "pwritev"),
    "the bytes are durable": (os, "fsync"),
    "it has its name": (Path, "rename"),
    "it has its record": (disk_store, "write_record"),
    "a record is gone": (Path, "unlink"),
}


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("where", sorted(KILLED_AT))
@pytest.mark.parametrize("number", [1, 2, 3])
def test_whoever_is_killed_leaves_one_whole_image(
    start: Start, opened: Opened, config: Config, where: str, number: int, *, is_after: bool
) -> None:
    start(LLAMA).close()

    def move_and_die() -> None:
        owner, name = KILLED_AT[where]
        before, calls = getattr(owner, name), [0]

        def act(*args: Any, **words: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and not is_after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = before(*args, **words)
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, act)
        make_budget(config, GIB).claim("qwen", WHOLE_BYTES)

    assert exit_code_of_child(move_and_die) in (-signal.SIGKILL, 0)
    copy = opened()
    assert copy is not None
    check(copy, LLAMA)
    assert copy.is_shared
    copy.close()
    start(QWEN, OTHER_KEY).close()  # which sweeps, too
    again = opened()
    assert again is not None
    check(again, LLAMA)
    assert list(config.copies_dir.parent.glob("*/*.part")) == []


def test_without_o_direct_the_page_cache_is_used_and_said_once(
    start: Start,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(direct_file, "_said", set())
    before = os.open

    def open_without(path: Any, flags: int, *more: Any, **words: Any) -> int:
        fd = before(path, flags & ~os.O_DIRECT, *more, **words)
        if flags & os.O_DIRECT:  # some make the file before they refuse
            os.close(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fd

    monkeypatch.setattr(os, "open", open_without)
    moved_out(start)
    copy = opened()
    assert copy is not None
    check(copy, LLAMA)
    assert caplog.text.count("knows no O_DIRECT") == 1


def test_a_file_system_that_refuses_o_direct_when_it_is_read_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(direct_file, "_said", set())
    path, content = tmp_path / "file", os.urandom(PAGE_BYTES)
    path.write_bytes(content)
    before = os.preadv

    def read(fd: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return before(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    whole = HostBytes(PAGE_BYTES, PAGE_BYTES)
    with DirectFile(path, os.O_RDONLY) as file:
        assert file.is_direct
        file.read(whole.address, PAGE_BYTES, 0)
        assert not file.is_direct
        assert bytes_of(whole) == content
        with pytest.raises(OSError, match="it ends after 65536 bytes"):
            file.read(whole.address, PAGE_BYTES, PAGE_BYTES)
    whole.close()
    assert caplog.text.count("knows no O_DIRECT") == 1


def bytes_of(whole: HostBytes) -> bytes:
    return ctypes.string_at(whole.address, whole.num_bytes)


def test_where_it_can_be_images_go_beside_the_page_cache(disk: Path, config: Config) -> None:
    with DirectFile(config.copies_dir.parent / "one", os.O_RDWR | os.O_CREAT) as file:
        assert file.is_direct
        assert fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT


def test_a_process_of_its_own_memory_has_the_bytes_of_the_disk_too(
    start: Start, opened: Opened, monkeypatch: pytest.MonkeyPatch, image: Path
) -> None:
    moved_out(start)
    image.mkdir()  # so that nothing can be shared there
    copy = opened()
    assert copy is not None
    check(copy, LLAMA)
    assert not copy.is_shared


def test_nobody_waits_for_the_rest_of_an_image_that_is_wanted_no_more(
    start: Start, opened: Opened, monkeypatch: pytest.MonkeyPatch, disk: Path
) -> None:
    moved_out(start)
    stop, before = Event(), os.preadv

    def read(*args: Any) -> int:
        stop.set()
        return before(*args)

    monkeypatch.setattr(os, "preadv", read)
    assert opened(stop=stop) is None
    monkeypatch.undo()
    assert read_moves(disk).num_read == 0
    copy = opened()
    assert copy is not None
    check(copy, LLAMA)


def test_a_kept_image_is_found_on_the_disk_too(config: Config, disk: Path, start: Start) -> None:
    loaded = Loaded("origin", "layout", [1], {})
    budget = make_budget(config, GIB)
    copy = open_copy(config, KEY, LAYOUT, budget, loaded=loaded)
    assert copy is not None
    assert copy.fill(LLAMA, Event())
    copy.close()
    start(QWEN, OTHER_KEY).close()
    assert find_kept([config.copies_dir], "origin") is None
    assert find_kept([config.copies_dir, disk], "other") is None
    kept = open_kept(config, "origin", budget)
    assert kept is not None
    assert contents(kept[0]) == LLAMA.content
    assert kept[1] == loaded
    kept[0].distrust()
    kept[0].close()
    start(QWEN, OTHER_KEY).close()  # it goes to the disk again, and what the disk says goes
    assert names(disk) == ["llama", "qwen"]
    assert json.loads((disk / f"{KEY.digest}.json").read_text())["loaded"] is None
    assert open_kept(config, "origin", budget) is None


def test_a_folder_on_the_disk_that_others_may_look_into_is_said(
    start: Start, config: Config, disk: Path
) -> None:
    start(LLAMA).close()
    disk.mkdir(mode=0o755)
    disk.chmod(0o755)
    with pytest.raises(HostBudgetError, match=r"KVCACHED_WEIGHTS_DISK=.* is open to other users"):
        make_budget(config, GIB).claim("qwen", WHOLE_BYTES)
    assert names(config.copies_dir) == ["llama"]


def test_what_is_on_its_way_to_the_disk_counts_there(config: Config, disk: Path) -> None:
    disk.mkdir()
    before = disk_store.room_bytes(disk, config)
    with (disk / "some.part").open("wb") as file:
        file.truncate(GIB)
    assert before - disk_store.room_bytes(disk, config) >= GIB - 64 * PAGE_BYTES
