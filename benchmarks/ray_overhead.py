"""What the application for Ray adds to a request, above a bare application that streams.

    python benchmarks/ray_overhead.py --json benchmarks/results/ray_overhead.json

A stand-in streams as fast as it is asked to. On one node of Ray it is asked directly, through ours,
through a bare application that passes it on, and so on; each request of each way in turn, in one
run. `again` is the bare application once more: what it adds to itself is how well this measures.
Ray and ours come from `--ray-python`, whose environment `make environments` makes.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import uvloop
from parts import gateway_house
from parts.gateway_load import Connection, connect, post
from parts.machine import describe_machine
from parts.ordered import value_at
from parts.record import command_line, end_by_signals, write

from kvcached_demo.harness.server import free_port

HERE = Path(__file__).parent
RAY_PYTHON = HERE.parent / ".venv-ray" / "bin" / "python"
ROUNDS = 5
NUM_REQUESTS = 300
NUM_FIRST = 50  # of each way, before the first round
START_SECONDS = 300.0
MODEL = "standin"
PORTS = (
    "--ray-client-server-port",
    "--dashboard-agent-grpc-port",
    "--dashboard-agent-listen-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)
PATH = "/v1/chat/completions"
BARE, AGAIN, PASSING, OURS = "bare", "again", "passing", "ours"
PREFIXES = {"direct": "", BARE: "/bare", AGAIN: "/again", PASSING: "/passing", OURS: ""}


def serve_config(http_port: int, models: Path, standin_url: str) -> dict[str, Any]:
    """Return Serve's file: ours and the bare applications, on one node."""
    bare: dict[str, dict[str, str]] = {BARE: {}, AGAIN: {}, PASSING: {"url": standin_url}}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": http_port},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": OURS,
                "route_prefix": "/",
                "import_path": "kvcached_ray:app",
                "args": {"models": str(models)},
            },
            *(
                {
                    "name": name,
                    "route_prefix": PREFIXES[name],
                    "import_path": "ray_bare:app",
                    "args": arguments,
                }
                for name, arguments in bare.items()
            ),
        ],
    }


@contextlib.contextmanager
def on_ray(python: Path, standin_url: str) -> Iterator[int]:
    """Serve all applications on a node of Ray inside a block, at the port that is returned."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvr-", dir="/tmp")))
        head, http_port, programs = free_port(), free_port(), python.parent.absolute()
        (folder / "kv").mkdir(mode=0o700)
        models = folder / "models.yaml"
        models.write_text(
            json.dumps({"devices": ["host"], "models": {MODEL: {"url": standin_url}}})
        )
        environ = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", ""))),
            "KVCACHED_DIR": str(folder / "kv"),
            "RAY_AUTH_MODE": "disabled",  # whatever token this user has
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # the stand-in and the client have none either
            "RAY_raylet_start_wait_time_s": str(int(START_SECONDS)),
        }
        words = [
            *("start", "--head", "--block", "--port", str(head), "--include-dashboard=false"),
            *("--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(folder / "t")),
            *("--num-cpus", "2", "--object-store-memory", "80000000", "--disable-usage-stats"),
            # A node that has to wait for its agents to name these gives up where many wait.
            *(word for option in PORTS for word in (option, str(free_port()))),
        ]
        log = stack.enter_context((folder / "ray.log").open("w"))
        node = subprocess.Popen(
            [str(programs / "ray"), *words],
            env=environ,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        stack.callback(_end, node)
        _await(lambda: "Ray runtime started" in (folder / "ray.log").read_text(), node)
        file = folder / "serve.yaml"
        file.write_text(json.dumps(serve_config(http_port, models, standin_url)))
        subprocess.run(
            [
                str(programs / "serve"),
                *("run", "--non-blocking", "--address", f"127.0.0.1:{head}", str(file)),
            ],
            env=environ,
            stdout=log,
            stderr=log,
            check=True,
        )
        _await(lambda: _is_ready(http_port), node)
        yield http_port


def _end(node: "subprocess.Popen[bytes]") -> None:
    """End the node: politely, because its processes have sessions of their own."""
    node.send_signal(signal.SIGTERM)
    node.wait()


def _await(is_up: Any, node: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_SECONDS
    while not is_up():
        if node.poll() is not None or time.monotonic() > until:
            raise RuntimeError("the node of Ray, or its applications, did not start")
        time.sleep(0.2)


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


async def take_turns(connections: Mapping[str, Connection], num: int) -> dict[str, list[float]]:
    """Ask each way `num` times, one request after the other; return TTFTs in ms."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "word " * 200}],
        "max_tokens": 1,
        "stream": True,
    }
    asked = {way: post(f"{PREFIXES[way]}{PATH}", "x", body) for way in connections}
    taken: dict[str, list[float]] = {way: [] for way in connections}
    ways, chosen = list(connections), random.Random(num)
    for _ in range(num):
        chosen.shuffle(ways)  # who comes behind another one finds what that one woke
        for way in ways:
            taken[way].append((await connections[way].ask(asked[way])).ttft_seconds * 1e3)
    return taken


async def measure(standin_port: int, http_port: int, num_rounds: int) -> list[dict[str, Any]]:
    """Return the figures of each round, by the ways."""
    ways = {way: standin_port if way == "direct" else http_port for way in PREFIXES}
    connections = {way: await connect(port) for way, port in ways.items()}
    await take_turns(connections, NUM_FIRST)
    rounds = []
    for _ in range(num_rounds):
        taken = await take_turns(connections, NUM_REQUESTS)
        rounds.append(
            {
                way: {"ttft_p50_ms": value_at(50, ttfts), "ttft_p99_ms": value_at(99, ttfts)}
                for way, ttfts in taken.items()
            }
        )
    for connection in connections.values():
        connection.close()
    await asyncio.sleep(0)  # until they are closed
    return rounds


def summarise(rounds: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return what ways add to others, round by round."""
    pairs = {
        "ours_above_bare": (OURS, BARE),
        "ours_above_passing": (OURS, PASSING),
        "bare_above_itself": (AGAIN, BARE),
        "bare_above_direct": (BARE, "direct"),
    }
    return {
        name: {
            figure: [each[way][figure] - each[base][figure] for each in rounds]
            for figure in ("ttft_p50_ms", "ttft_p99_ms")
        }
        for name, (way, base) in pairs.items()
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__)
    arguments.add_argument("--ray-python", type=Path, default=RAY_PYTHON)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    options = arguments.parse_args()
    end_by_signals(signal.SIGTERM)  # and end the node
    with gateway_house.standin() as standin:
        url = f"http://127.0.0.1:{standin.port}"
        with on_ray(options.ray_python, url) as http_port:
            rounds = uvloop.run(measure(standin.port, http_port, options.rounds))
    results = {
        "machine": describe_machine() | {"usable_cores": len(os.sched_getaffinity(0))},
        "load": os.getloadavg(),
        "requests_per_round": NUM_REQUESTS,
        "rounds": rounds,
        "added": summarise(rounds),
        "ratio": {
            "ours_to_bare": [
                each[OURS]["ttft_p50_ms"] / each[BARE]["ttft_p50_ms"] for each in rounds
            ]
        },
    }
    for name, figures in results["added"].items():
        for figure, values in figures.items():
            least, most = min(values), max(values)
            print(f"{name:20} {figure} {statistics.median(values):.2f} ({least:.2f} to {most:.2f})")
    write(options.json, results)


if __name__ == "__main__":
    main()
