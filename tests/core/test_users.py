"""Another user, a folder that may not be written: a message, the right exit code, and no harm."""

import contextlib
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from kvcached_core.cli.app import main
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import GIB, MIB

IS_ROOT = os.geteuid() == 0
PLAIN_USER = 65534 if IS_ROOT else os.geteuid()

pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


@pytest.fixture
def reachable() -> Iterator[Path]:
    """Yield a folder that others reach: every pytest that starts closes pytest's own to them."""
    with tempfile.TemporaryDirectory(prefix="kvcached-users-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@pytest.fixture
def others_folder(reachable: Path) -> Iterator[Path]:
    """Yield a folder that is not the plain user's: our own if we are root, else one of root's."""
    if not IS_ROOT:
        yield Path("/usr")
        return
    with Ledger(ledger_directory(reachable / "kv") / "host.ledger", GIB) as ledger:
        row = ledger.register(name="llama", engine="vLLM")
        ledger.promise(row, 64 * MIB, MIB)
        before = ledger.view()
        yield ledger.path.parent
        assert ledger.view() == before


def as_plain_user(action: Callable[[], object]) -> tuple[int, str]:
    """Run `action` in a child that is not root; return its exit code and what it said."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        if IS_ROOT:
            os.setgroups([])
            os.setresgid(PLAIN_USER, PLAIN_USER, PLAIN_USER)
            os.setresuid(PLAIN_USER, PLAIN_USER, PLAIN_USER)
        code, text = outcome(action)
        os.write(writer, text.encode())
        os._exit(code)
    os.close(writer)
    with open(reader) as pipe:  # noqa: PTH123  a descriptor
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def outcome(action: Callable[[], object]) -> tuple[int, str]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            action()
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    except Exception as error:  # noqa: BLE001  the parent judges it
        return 99, f"{said.getvalue()}{type(error).__name__}: {error}"
    return 0, said.getvalue()


def command(*arguments: str) -> Callable[[Path], object]:
    """Return a run of our command, with all it imports loaded: a plain user may not read it."""

    def run(folder: Path) -> None:
        sys.argv = ["kvcached", *arguments, "--dir", str(folder)]
        main()

    outcome(lambda: run(Path("/nowhere")))
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("top", "--once"),
        ("limit", "llama", "1MiB"),
        ("trim",),
        ("metrics", "--once"),
        ("doctor",),
    ],
)
def test_another_user_can_neither_read_nor_steer(
    others_folder: Path, arguments: tuple[str, ...]
) -> None:
    code, text = as_plain_user(partial(command(*arguments), others_folder))
    assert (code, "is not a folder of this user" in text) == (1, True), text
    assert "llama" not in text


@pytest.fixture
def read_only_folder(reachable: Path) -> Iterator[Path]:
    folder = ledger_directory(reachable / "kv")
    os.chown(folder, PLAIN_USER, -1)
    folder.chmod(0o500)
    yield folder
    folder.chmod(0o700)


def test_a_read_only_folder_is_said_with_what_to_do(read_only_folder: Path) -> None:
    def start() -> None:
        Ledger(read_only_folder / "host.ledger", GIB)

    code, text = as_plain_user(start)
    assert code == 99
    assert text == (
        f"LedgerError: the ledger {read_only_folder}/host.ledger cannot be opened: Permission "
        "denied; set KVCACHED_DIR to a folder that this user may write"
    )
    code, text = as_plain_user(partial(command("doctor"), read_only_folder))
    assert code == 1
    assert (
        f"KVCACHED_DIR='{read_only_folder}' cannot be written: Permission denied; "
        "set KVCACHED_DIR to a folder that this user may write"
    ) in text
