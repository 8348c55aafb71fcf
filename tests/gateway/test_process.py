"""Processes end to the last of their session, are adopted, and are never taken for another."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_gateway.engines.process import EngineProcess, adopt, start
from kvcached_gateway.engines.sessions import (
    MARK,
    Identity,
    kill_session,
    members,
    memory_bytes,
    orphans,
)
from kvcached_gateway.errors import AdoptionError

# Says its number and those of two children: one in its group, one in a group of its own. All of
# them are deaf to the polite signal where the first argument says so.
FAMILY = """
import os, signal, sys, time
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = []
for is_apart in (False, True):
    pid = os.fork()
    if pid == 0:
        if is_apart:
            os.setpgid(0, 0)
        time.sleep(600)
    pids.append(pid)
print(os.getpid(), *pids, flush=True)
time.sleep(600)
"""


class Family:
    """A session of three processes."""

    def __init__(self, folder: Path, manners: str = "polite", mark: str = "") -> None:
        self.log = folder / "family.log"
        environ = dict(os.environ) | ({MARK: mark} if mark else {})
        words = [sys.executable, "-c", FAMILY, manners]
        self.process = start(words, environ, log=self.log, folder=folder)

    async def pids(self) -> list[int]:
        return await said(self.log)


async def said(log: Path) -> list[int]:
    """Return the numbers of a family when it has said them."""

    def wait() -> list[int]:
        await_that(lambda: log.read_text().endswith("\n"))
        return [int(word) for word in log.read_text().split()]

    return await asyncio.to_thread(wait)


def leave_a_family(log: Path) -> None:
    """Let a process that ends at once start a family."""
    words = [sys.executable, "-c", FAMILY, "polite"]
    script = f"import subprocess; subprocess.Popen({words!r}, start_new_session=True)"
    with log.open("w") as output:
        subprocess.run([sys.executable, "-c", script], check=True, stdout=output)


def is_there(pid: int) -> bool:
    try:
        return Identity.of(pid).is_running()
    except ProcessLookupError:
        return False


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await main()

    asyncio.run(limited())


@pytest.mark.parametrize("manners", ["polite", "deaf"])
def test_the_end_leaves_no_process_of_the_session(tmp_path: Path, manners: str) -> None:
    async def main() -> None:
        family = Family(tmp_path, manners)
        pids = await family.pids()
        assert pids[0] == family.process.pid
        await family.process.end(0.2)
        assert not any(map(is_there, pids))
        expected = signal.SIGTERM if manners == "polite" else signal.SIGKILL
        assert family.process.exit_code == -expected

    run(main)


def test_whoever_outlives_the_first_process_is_ended_too(tmp_path: Path) -> None:
    async def main() -> None:
        family = Family(tmp_path)
        pids = await family.pids()
        os.kill(pids[0], signal.SIGKILL)
        await family.process.ended()
        assert not family.process.is_running
        assert all(map(is_there, pids[1:]))
        await family.process.end(5.0)
        assert not any(map(is_there, pids))

    run(main)


def test_an_abort_reaches_each_process_and_ends_a_stopped_one(tmp_path: Path) -> None:
    async def main() -> None:
        family = Family(tmp_path)
        pids = await family.pids()
        os.kill(pids[0], signal.SIGSTOP)
        await family.process.abort(0.1)
        assert not any(map(is_there, pids))

    run(main)


def test_an_adopted_process_is_watched_and_ended_though_it_is_no_child(tmp_path: Path) -> None:
    async def main() -> None:
        log = tmp_path / "orphans.log"
        await asyncio.to_thread(leave_a_family, log)
        pids = await said(log)
        process = adopt(Identity.of(pids[0]))
        assert process.is_running
        assert memory_bytes([process.identity])[process.identity] > 0
        await process.end(5.0)
        assert not any(map(is_there, pids))
        assert process.exit_code is None

    run(main)


def test_a_number_that_is_another_process_now_is_not_adopted_and_not_killed(tmp_path: Path) -> None:
    async def main() -> None:
        family = Family(tmp_path)
        pids = await family.pids()
        identity = family.process.identity
        for other in (
            replace(identity, start_ticks=identity.start_ticks - 1),
            replace(identity, boot_id="another boot"),
        ):
            assert members(other) == []
            with pytest.raises(AdoptionError, match=f"the number {pids[0]} is another process's"):
                adopt(other)
            await kill_session(other)
        assert all(map(is_there, pids))
        await family.process.end(5.0)
        with pytest.raises(AdoptionError, match=r"gone|another process's"):
            adopt(identity)

    run(main)


def test_engines_that_no_record_knows_are_found_by_their_folder(tmp_path: Path) -> None:
    async def main() -> None:
        family = Family(tmp_path, mark=str(tmp_path))
        await family.pids()
        identity = family.process.identity
        assert orphans(tmp_path, []) == [identity]
        assert orphans(tmp_path, [identity]) == []
        assert orphans(tmp_path / "other", []) == []
        await family.process.end(5.0)
        assert orphans(tmp_path, []) == []

    run(main)


def test_a_log_is_ours_alone_and_keeps_what_was_written_before(tmp_path: Path) -> None:
    async def main() -> None:
        log = tmp_path / "engine.log"
        for word in ("first", "second"):
            words = [sys.executable, "-c", f"print('{word}')"]
            process: EngineProcess = start(words, os.environ, log=log, folder=tmp_path)
            await process.ended()
            assert process.exit_code == 0
            await process.end(0.0)
        assert log.read_text() == "first\nsecond\n"
        assert stat.S_IMODE(log.stat().st_mode) == 0o600

    run(main)


def test_a_program_that_is_not_there_is_the_system_s_error(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            start([str(tmp_path / "none")], {}, log=tmp_path / "log", folder=tmp_path)

    run(main)
