"""MPS's daemon for a block, with a program of its name that answers as it does."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.processes import is_running
from parts import mps

SCRIPT = f"""#!{sys.executable}
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
log = pathlib.Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]) / "control.log"
how = os.environ.get("HOW", "")
if sys.argv[1:] == ["-f"]:
    log.write_text("no device may be used")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        sys.exit(2)
    if how == "refused":
        sys.exit(1)
    server = subprocess.Popen(["sleep", "600"])
    (folder / "server").write_text(str(server.pid))
    (pathlib.Path(os.environ["SEEN"])).write_text(f"{{os.getpid()}} {{server.pid}} {{folder}}")
    (folder / "up").touch()
    while not (folder / "quit").exists():
        time.sleep(0.01)
    server.kill()
    server.wait()
    sys.exit()
if not (folder / "up").exists():
    sys.exit(1)
words = sys.stdin.read().split()
if words == ["get_server_list"]:
    print((folder / "server").read_text())
elif words == ["get_client_list", (folder / "server").read_text()]:
    print("101\\n102")
elif words == ["quit"] and how != "stubborn":
    (folder / "quit").touch()
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the program in front of all others; return where it writes who it is."""
    program = tmp_path / mps.CONTROL
    program.write_text(SCRIPT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv(mps.DEVICES, "1")  # clients' own
    return tmp_path / "seen"


def anything(_environ: Mapping[str, str]) -> None:
    """Find nothing wrong."""


def started(seen: Path) -> tuple[int, int, Path]:
    daemon, server, folder = seen.read_text().split()
    return int(daemon), int(server), Path(folder)


def test_a_daemon_answers_in_its_own_folders_and_is_gone_behind_the_block(seen: Path) -> None:
    with mps.running(anything) as daemon:
        pid, server, folder = started(seen)
        assert daemon.environ[mps.PIPES] == str(folder)
        assert daemon.num_clients() == 2
        assert is_running(pid)
    assert not is_running(pid)
    assert not is_running(server)
    assert not folder.exists()


def test_one_that_does_not_quit_is_killed_with_its_server(
    seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW", "stubborn")
    monkeypatch.setattr(mps, "END_SECONDS", 0.1)
    with mps.running(anything):
        pid, server, _ = started(seen)
    assert not is_running(pid)
    assert not is_running(server)


def test_it_is_gone_too_when_the_block_fails(seen: Path) -> None:
    with pytest.raises(KeyboardInterrupt), mps.running(anything):
        raise KeyboardInterrupt
    assert not is_running(started(seen)[0])


def test_one_that_may_not_be_started_says_why(seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "refused")
    with pytest.raises(mps.MpsError, match="exit code 1: no device may be used"):
        mps.running(anything).__enter__()
    assert not seen.exists()


def test_one_whose_client_cannot_compute_is_ended_and_says_why(seen: Path) -> None:
    def check(environ: Mapping[str, str]) -> None:
        mps.probe(environ, python="/bin/false")

    with pytest.raises(mps.MpsError, match=r"client of the daemon failed.*no device may be used"):
        mps.running(check).__enter__()
    assert not is_running(started(seen)[0])


def test_none_at_all_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(mps.MpsError, match=f"{mps.CONTROL} is not there"):
        mps.running(anything).__enter__()
