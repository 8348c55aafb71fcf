"""Images of weights from a disk: what one takes beside the disk's own speed, and many at random.

    python benchmarks/disk_images.py --json benchmarks/results/disk_images.json

First one image, read by plain threads and brought back as an engine has it, in turn: both beside
the page cache. Then processes with an image each, and host memory for a third of them, are asked
at random, two at a time and then one. Each has its copy back, compares all of it, and lets others
have it. On a busy machine run it with a higher priority: it compares what takes processors, too.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from parts.disk_engine import Engine, Pages, run_engine
from parts.machine import describe_machine
from parts.record import Record

from kvcached_core.config import Config
from kvcached_core.units import GIB, MIB, parse_bytes
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.moves import read_moves

MEMORY = "/dev/shm"  # noqa: S108  a folder of a name of its own is made there
BLOCK_BYTES, NUM_THREADS = 16 * MIB, 8  # as images are read
AT_ONCE = (2, 1)  # asks
BAR_FACTOR, BAR_SECONDS = 1.2, 0.2


@contextmanager
def settings(disk: Path, budget_bytes: int) -> Iterator[Config]:
    """Yield settings of folders of their own, which go afterwards."""
    memory = Path(tempfile.mkdtemp(prefix="kv-", dir=MEMORY))
    place = Path(tempfile.mkdtemp(prefix="kv-", dir=disk))
    try:
        yield Config(
            dir=memory,
            weights_dir=memory / "weights",
            weights_disk=place,
            weights_disk_free="2%",
            host_budget=budget_bytes,
        )
    finally:
        shutil.rmtree(memory)
        shutil.rmtree(place)


def read_plainly(path: Path) -> float:
    """Return what it takes to read a file with O_DIRECT, in large blocks, several at a time."""
    rooms: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(NUM_THREADS):
        room = mmap.mmap(-1, BLOCK_BYTES)
        room.write(bytes(BLOCK_BYTES))  # it is there before the clock runs
        rooms.put(room)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(offset: int) -> int:
        room = rooms.get()
        try:
            return os.preadv(fd, [room], offset)
        finally:
            rooms.put(room)

    begin = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        num_bytes = sum(pool.map(read, range(0, path.stat().st_size, BLOCK_BYTES)))
    seconds = time.perf_counter() - begin
    os.close(fd)
    if num_bytes != path.stat().st_size:
        raise OSError(f"{path} was not read in full")
    return seconds


def bar(num_bytes: int, bytes_per_second: float) -> float:
    """Return what an image may take."""
    return BAR_FACTOR * num_bytes / bytes_per_second + BAR_SECONDS


def one_image(disk: Path, num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """Read one image plainly and bring it back, in turn."""
    with settings(disk, num_bytes) as config:
        engine = Engine(0, Pages(0, num_bytes), config)
        engine.start()
        plain, back, right = [], [], True
        for _ in range(num_rounds):
            if engine.copy is not None:
                engine.copy.close()
            make_budget(config).claim("another", num_bytes).close()  # so that it goes
            (path,) = Path(str(config.weights_disk)).glob("*.image")
            plain.append(read_plainly(path))
            begin = time.perf_counter()
            engine.start()
            back.append(time.perf_counter() - begin)
            right &= engine.is_right()
        if engine.copy is not None:
            engine.copy.close()
        moves = read_moves(Path(str(config.weights_disk)))
        if moves.num_read != num_rounds:
            raise RuntimeError(f"it came back {moves.num_read} times, not {num_rounds}")
    speed = num_bytes / statistics.median(plain)
    return {
        "num_bytes": num_bytes,
        "plain_seconds": plain,
        "back_seconds": back,
        "write_seconds": moves.write_seconds,
        "bytes_per_second": speed,
        "ratios": [ours / theirs for ours, theirs in zip(back, plain, strict=True)],
        "bar_seconds": bar(num_bytes, speed),
        "is_right": right,
    }


def many_images(options: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """Start processes with an image each, and ask them at random; tell what was found so far."""
    disk, num_models, num_rooms = options.disk, options.models, options.rooms
    num_bytes = parse_bytes(options.model_size, what="--model-size")
    with settings(disk, num_rooms * num_bytes) as config:
        words = [sys.executable, __file__, "--engine-bytes", str(num_bytes)]
        words += ["--settings", config.model_dump_json(), "--engine"]
        engines = []
        begin = time.monotonic()
        for number in range(num_models):
            pipe = subprocess.PIPE
            engine = subprocess.Popen([*words, str(number)], stdin=pipe, stdout=pipe, text=True)
            if read_line(engine) != "ready":
                raise RuntimeError(f"engine {number} did not start")
            engines.append(engine)
        start_seconds = time.monotonic() - begin
        started = read_moves(Path(str(config.weights_disk)))
        path = next(Path(str(config.weights_disk)).glob("*.image"))
        plain = [read_plainly(path) for _ in range(3)]
        asked: dict[str, Any] = {}
        found: dict[str, Any] = {
            "num_models": num_models,
            "num_rooms": num_rooms,
            "num_bytes": num_bytes,
            "start_seconds": start_seconds,
            "asked": asked,
            "num_written_at_start": started.num_written,
        }
        for at_once in AT_ONCE:
            chance = random.Random(at_once)
            asks = [chance.randrange(num_models) for _ in range(options.asks)]
            asked[f"{at_once} at a time"] = told(ask_all(engines, asks, at_once))
            plain += [read_plainly(path) for _ in range(3)]
            speed = num_bytes / statistics.median(plain)
            tell(
                found
                | {
                    "num_written": read_moves(Path(str(config.weights_disk))).num_written,
                    "plain_seconds": plain,
                    "bytes_per_second": speed,
                    "bar_seconds": bar(num_bytes, speed),
                }
            )
        for engine in engines:
            engine.communicate()


def told(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what became of some asks."""
    return {
        "num_asks": len(found),
        "failed": sum(not one["is_there"] for one in found),
        "wrong": sum(not one["is_right"] for one in found),
        "from_disk_seconds": [
            one["seconds"] for one in found if one["is_from_disk"] and one["is_there"]
        ],
        "from_memory_seconds": [one["seconds"] for one in found if not one["is_from_disk"]],
        "most_tries": max(one["num_tries"] for one in found),
    }


def ask_all(engines: list[Any], asks: list[int], num_at_once: int) -> list[dict[str, Any]]:
    """Ask so many at a time, and nobody who has not answered yet."""
    locks = [Lock() for _ in engines]
    unanswered = {"is_there": False, "is_right": False, "is_from_disk": True, "num_tries": 0}

    def ask(number: int) -> dict[str, Any]:
        engine = engines[number]
        with locks[number]:
            engine.stdin.write("ask\n")
            engine.stdin.flush()
            return unanswered | json.loads(read_line(engine) or "{}")

    with ThreadPoolExecutor(num_at_once) as pool:
        return list(pool.map(ask, asks))


def read_line(engine: "subprocess.Popen[str]") -> str:
    """Return the next line that an engine says; empty if it ended."""
    return engine.stdout.readline().strip() if engine.stdout else ""


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    one, many = results["one"], results["many"]
    lines = [
        (
            f"one image of {one['num_bytes'] / GIB:.1f} GiB: plain reads "
            f"{statistics.median(one['plain_seconds']):.2f} s, brought back "
            f"{statistics.median(one['back_seconds']):.2f} s; the bar is {one['bar_seconds']:.2f} s"
        )
    ]
    for name, asked in many["asked"].items():
        times = asked["from_disk_seconds"]
        lines.append(
            f"{many['num_models']} models, host memory for {many['num_rooms']}, "
            f"{asked['num_asks']} asks {name}: {asked['failed']} failed, {asked['wrong']} wrong; "
            f"{len(times)} from the disk in {statistics.median(times):.2f} s (up to "
            f"{max(times):.2f} s); the bar is {many['bar_seconds']:.2f} s"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("disk_images.json"))
    parser.add_argument("--disk", type=Path, default=Path.cwd(), help="a folder on the disk")
    parser.add_argument("--size", default="2GiB", help="of the one image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--rooms", type=int, default=10)
    parser.add_argument("--model-size", default="256MiB")
    parser.add_argument("--asks", type=int, default=120)
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--engine-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        config = Config.model_validate_json(options.settings)
        run_engine(options.engine, options.engine_bytes, config)
        return 0
    record = Record(options.json)
    record.add(machine=describe_machine())
    size = parse_bytes(options.size, what="--size")
    record.add(one=one_image(options.disk, size, options.rounds))
    many_images(options, lambda found: record.add(many=found))
    print(table(record.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
