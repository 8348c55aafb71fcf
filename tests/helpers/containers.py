"""What `docker run` does with memory, folders and processes, done by `unshare`.

A container here has namespaces of its own for processes and mounts, a `/dev/shm` of its own size,
and the folders that it is given. It has the machine's files and network. Its first process is
number 1 in it, and all others end with that one.
"""

import argparse
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SHM = PurePosixPath("/dev/shm")  # noqa: S108  the container's own
# The same user inside as outside, who may mount there; `unshare` needs no root for it.
ISOLATED = ("unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child")
WITH_PROC = (*ISOLATED, "--mount-proc")
# Docker mounts a container's folders into its own /dev/shm, so that is made beside it first.
SCRIPT = """
mount -t tmpfs -o "size=$1" shm /mnt
mkdir -p "/mnt/$3"
mount --bind "$2" "/mnt/$3"
mount --move /mnt /dev/shm
shift 3
exec "$@"
"""


@dataclass(frozen=True)
class Container:
    """What a `docker run` command asks for.

    Attributes:
        shm_size: The size of its `/dev/shm`.
        source: The folder of the host that it is given.
        target: Where that is in its `/dev/shm`, from there.
        environ: Its variables.
        port: The port that its server listens on.
        words: What runs in it.
    """

    shm_size: str
    source: Path
    target: PurePosixPath
    environ: dict[str, str]
    port: int
    words: tuple[str, ...]

    def command(self, words: list[str], source: Path | None = None) -> list[str]:
        """Return what runs `words` as in this container, with another folder of the host."""
        folder = str(source or self.source)
        script = ("bash", "-euc", SCRIPT, "container", self.shm_size, folder, str(self.target))
        return [*WITH_PROC, *script, *words]


def parse(command: str) -> Container:
    """Read a `docker run` command; an option that is not known here ends the program."""
    parser = argparse.ArgumentParser("docker run")
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--gpus", required=True)
    parser.add_argument("--shm-size", required=True)
    parser.add_argument("--volume", required=True)
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--publish", required=True)
    parser.add_argument("image")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args(shlex.split(command.removeprefix("docker run ")))
    source, target = given.volume.split(":")
    return Container(
        given.shm_size,
        Path(source),
        PurePosixPath(target).relative_to(SHM),
        dict(variable.split("=", 1) for variable in given.env),
        int(given.publish.split(":")[1]),
        tuple(given.words),
    )


def why_not() -> str:
    """Say why this machine lets nobody have such namespaces; nothing where it does."""
    done = subprocess.run([*WITH_PROC, "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""
