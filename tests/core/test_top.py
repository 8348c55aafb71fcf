"""The picture of `kvcached top`: readable in every terminal, with and without colours."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.commands import KVCACHED
from helpers.waiting import PATIENCE_SECONDS
from rich.console import Console

from kvcached_core.cli.columns import (
    ASCII_SIGNS,
    SIGNS,
    WEIGHTS,
    bar,
    short_bytes,
    shortened,
    weights_text,
)
from kvcached_core.cli.history import History
from kvcached_core.cli.picture import Picture
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import GIB, KIB, MIB

GPU = "GPU-5f2c1c3e-8f5e-4c3b-9e39-1f2f3a4b5c6d"
LONG_NAME = "meta-llama-Llama-3.1-8B-Instruct"


def instance(
    name: str,
    *,
    used: int = 0,
    cached: int = 0,
    idle: int = 0,
    weights: int = 0,
    needed: int = 0,
    since: int = 0,
) -> InstanceView:
    numbers = dict.fromkeys((field.name for field in fields(InstanceView)), 0)
    return InstanceView(
        **{
            **numbers,
            "used_bytes": used,
            "cached_bytes": cached,
            "idle_bytes": idle,
            "resident_bytes": used + cached + idle + weights,
            "weights_bytes": weights,
            "weights_needed_bytes": needed,
            "waking_since_ns": since,
            "limit_bytes": None,
            "pid": 3817422,
            "name": name,
            "engine": "vLLM 0.32.0",
        }
    )


DEVICES = [
    DeviceView(
        GPU,
        80 * GIB,
        (
            instance(LONG_NAME, used=20 * GIB, cached=9 * GIB, idle=1300 * MIB),
            instance(LONG_NAME + "-2", used=1000 * MIB, cached=23 * MIB),
        ),
    ),
    DeviceView("host", GIB, (instance("qwen", used=16 * MIB, idle=16 * MIB),)),
]


def drawn(width: int, height: int | None = None, devices: list[DeviceView] = DEVICES) -> list[str]:
    """Return the lines of the picture as a terminal without colours shows them."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    options = console.options.update(width=width, height=height)
    lines = console.render_lines(Picture(devices), options, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def titles(width: int) -> list[str]:
    return drawn(width)[0].split()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_every_number_and_the_names_are_whole_from_60_columns_on(width: int) -> None:
    lines = drawn(width)
    assert max(map(len, lines)) <= width
    assert {"instance", "resident", "used", "cached", "idle", "pressure"} <= set(titles(width))
    text = "\n".join(lines)
    for whole in ("30.3 GiB", "20 GiB", "1.27 GiB", "1023 MiB", "1000 MiB", "23 MiB", "32 MiB"):
        assert whole in text
    assert "…" not in titles(width)
    assert text.count("pid 3817422") == 3
    assert "qwen" in text


def test_a_wider_terminal_shows_more_columns_and_none_narrower() -> None:
    for width in range(60, 200):
        assert set(titles(width)) <= set(titles(width + 1))
    assert "memory" in titles(80)
    assert {"limit", "floor", "promised"} <= set(titles(120))


def test_names_that_are_cut_still_differ() -> None:
    names = [line.split()[0] for line in drawn(60) if line.startswith("meta")]
    assert len(set(names)) == len(names) == 2
    assert shortened("abcdefgh", 5) == "ab…gh"
    assert shortened("abc", 3) == "abc"


def test_used_cached_and_idle_look_different_without_colours() -> None:
    row = instance("a", used=2 * MIB, cached=5 * MIB, idle=MIB)
    text = bar(16 * MIB, row, width=64)
    assert [text.plain.count(sign) for sign in SIGNS] == [8, 20, 4, 0, 32]
    plain = bar(16 * MIB, row, width=64, is_ascii=True).plain
    assert [plain.count(sign) for sign in ASCII_SIGNS] == [8, 20, 4, 0, 32]
    for sign, state in zip("█▒░·", ("used", "cached", "idle", "free"), strict=True):
        assert f"{sign} {state}" in drawn(60)[-1]


YIELDING = DeviceView(
    GPU,
    80 * GIB,
    (
        instance("awake", used=2 * GIB, weights=15 * GIB, needed=15 * GIB),
        instance("half", weights=7373 * MIB, needed=15 * GIB),
        instance("asleep", needed=15 * GIB),
        instance("wakes", weights=9 * GIB, needed=15 * GIB, since=1),
        instance("kept", used=MIB),
    ),
)


def test_weights_have_a_column_and_a_sign_where_some_yield() -> None:
    assert "weights" not in "\n".join(drawn(200))
    lines = drawn(80, devices=[YIELDING])
    assert "weights" in lines[0].split()
    assert max(map(len, lines)) <= 80
    texts = ("15.0G", "7.2/15G", "0/15G", "waking 60 %", "-")
    for text, row in zip(texts, YIELDING.instances, strict=True):
        assert weights_text(row) == text
        assert any(line.startswith(row.name) and f" {text} " in line for line in lines)
    assert "▚ weights" in lines[-1]
    assert bar(80 * GIB, YIELDING.instances[0], width=80).plain == "█" * 2 + "▚" * 15 + "·" * 63


@pytest.mark.parametrize(
    ("there", "needed", "text"),
    [
        (0, MIB, "0/1.0M"),
        (MIB, MIB, "1.00M"),
        (140 * GIB, 140 * GIB, "140G"),
        (100 * MIB, 140 * GIB, "0.1/140G"),
        (3 * MIB, 0, "3.00M"),
    ],
)
def test_weights_of_every_size_fit_their_column(there: int, needed: int, text: str) -> None:
    assert weights_text(instance("a", weights=there, needed=needed)) == text
    assert len(text) <= WEIGHTS.width


def test_a_bar_never_grows_over_its_width() -> None:
    assert len(bar(MIB, instance("a", used=4 * MIB), width=20)) == 20
    assert len(bar(0, instance("a"), width=20)) == 20


def test_a_terminal_that_knows_no_blocks_gets_plain_signs() -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as file:
        console = Console(file=file, width=60)
        console.print(Picture([DEVICES[1]]))
        file.flush()
        text = file.buffer.getvalue().decode()  # type: ignore[attr-defined]  bytes in memory
    assert "# used" in text


@pytest.mark.parametrize("height", range(4, 14))
def test_what_does_not_fit_a_low_terminal_is_counted(height: int) -> None:
    lines = drawn(60, height)
    assert len(lines) <= height
    shown = sum(line.startswith(("meta", "qwen")) for line in lines)
    left_out = [int(line.split()[1]) for line in lines if line.startswith("and ")]
    assert shown + sum(left_out) == 3
    assert lines[0].startswith("instance")
    # Two lines for each instance with a bar, if there is room for all of them.
    assert ("pid" in "".join(lines)) == (height >= 10)


def test_a_ledger_that_cannot_be_read_is_a_line_above_the_others() -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    problem = "the ledger /dev/shm/kvcached-1000/GPU-1.ledger is damaged: its first word is wrong"
    for height in range(4, 14):
        options = console.options.update(width=60, height=height)
        lines = console.render_lines(Picture(DEVICES, problems=[problem]), options, pad=False)
        texts = ["".join(segment.text for segment in line).rstrip() for line in lines]
        assert len(texts) <= height
        assert texts[0] == shortened(problem, 60)
        assert texts[1].startswith("instance")
    console.print(Picture([], problems=[problem]))
    assert "no instance runs" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as opened:
        row = opened.register(name="llama", engine="vLLM 0.32.0", page_bytes=16 * MIB)
        opened.promise(row, 128 * MIB, 16 * MIB)
        opened.settle(row, mapped_bytes=128 * MIB, used_bytes=32 * MIB, cached_bytes=80 * MIB)
        yield opened


def test_a_real_terminal_of_60_by_12_shows_it_and_is_left_as_it_was(ledger: Ledger) -> None:
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        [KVCACHED, "top", "--interval", "0.1", "--dir", ledger.path.parent],
        env={**environ, "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        seen = ""
        while seen.count("· free") < 3:  # three pictures
            seen += os.read(master, 65536).decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    with open(master, "rb", buffering=0) as rest:  # noqa: PTH123  a descriptor
        seen += rest.read(65536).decode()
    first = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.split("· free")[0])
    lines = [line.rstrip() for line in first.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 60
    assert len(lines) <= 12
    for word in ("instance", "resident", "used", "cached", "idle", "llama", "128 MiB", "80 MiB"):
        assert word in first
    assert "\x1b[?1049l" in seen


def test_rates_and_curves_come_from_what_was_seen(ledger: Ledger) -> None:
    history = History()
    history.add([ledger.view()], 0.0)
    row = ledger.view().instances[0].row
    assert history.rate("host", "llama") is None
    ledger.settle(row, unmapped_bytes=64 * MIB, used_bytes=32 * MIB, cached_bytes=16 * MIB)
    history.add([ledger.view()], 2.0)
    assert history.rate("host", "llama") == (0.0, 32 * MIB)
    assert history.curve("host", "llama", GIB) == "▁▁"
    assert history.curve("host", "llama", GIB, is_ascii=True) == ".."


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023 * MIB, "1023 MiB"),
        (1000 * MIB, "1000 MiB"),
        (100 * GIB, "100 GiB"),
        (1300 * MIB, "1.27 GiB"),
        (1536 * KIB, "1.5 MiB"),
        (9999 * GIB, "9999 GiB"),
    ],
)
def test_sizes_have_three_digits_and_fit_their_columns(num_bytes: int, text: str) -> None:
    assert short_bytes(num_bytes) == text
    assert len(text) <= 8
