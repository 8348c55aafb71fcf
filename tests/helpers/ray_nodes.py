"""Nodes of Ray on one machine, each as alone as on one of its own.

A node has a PID namespace and a folder of ledgers (`KVCACHED_DIR`) of its own. All of it ends with
its first process, engines included.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from helpers.containers import WITH_PROC
from helpers.gateway_life import ENVIRON
from helpers.ray_models import POOL_BYTES, Extent, write_models
from kvcached_demo.harness.server import free_port
from kvcached_gateway.admin.client import Client, GatewayError
from kvcached_gateway.admin.views import ModelRow

HEAD, OTHER = "one", "two"
UP_SECONDS = 300.0
LOOK_SECONDS = 0.1
GONE_SECONDS = 60.0
OBJECT_STORE_BYTES = 80_000_000  # about the least that Ray takes
PORTS = (
    "--dashboard-agent-grpc-port",
    "--dashboard-agent-listen-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)
TESTS = Path(__file__).parents[1]
SITE = Path(__file__).with_name("ray_site")
PROGRAMS = Path(sys.executable).parent


def await_up(is_up: Callable[[], bool], what: str, *logs: Path) -> None:
    """Wait for what nobody tells of; an error holds the end of each log."""
    end = time.monotonic() + UP_SECONDS
    while not is_up():
        if time.monotonic() >= end:
            said = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
            raise AssertionError(f"{what} is not up after {UP_SECONDS} s:\n{said}")
        time.sleep(LOOK_SECONDS)


class RayNode:
    """A node that runs.

    Attributes:
        name: Its name.
        directory: Its `KVCACHED_DIR`.
        log: What `ray start` says.
    """

    def __init__(
        self, folder: Path, name: str, words: list[str], environ: Mapping[str, str]
    ) -> None:
        self.name = name
        self.directory = folder / name
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *WITH_PROC,
                    str(PROGRAMS / "ray"),
                    "start",
                    "--block",
                    "--node-name",
                    name,
                    *words,
                ],
                env={**environ, "KVCACHED_DIR": str(self.directory)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def rows(self) -> dict[str, ModelRow]:
        """Return what its gateway shows of each model."""
        return {row.id: row for row in Client(self.directory, UP_SECONDS).models()}

    def has_started(self) -> bool:
        self.check()
        return "Ray runtime started" in self.log.read_text(errors="replace")

    def check(self) -> None:
        """Fail if it has ended."""
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """Kill its first process, with which the kernel kills all others; wait for their end."""
        pid, children = self.process.pid, []
        if self.process.poll() is None:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        watched = [os.pidfd_open(int(child)) for child in children]
        self.process.kill()
        self.process.wait()
        for each in watched:
            assert select.select([each], [], [], GONE_SECONDS)[0], f"node {self.name} does not end"
            os.close(each)


class RayCluster:
    """Nodes of one cluster, and the application on it.

    Args:
        folder: A folder whose path is short enough for sockets.
        extent: What it will serve.

    Attributes:
        file: The file of models.
        nodes: Those that run, by their names.
    """

    def __init__(self, folder: Path, extent: Extent) -> None:
        self.folder = folder
        self.extent = extent
        self.file = write_models(folder, extent)
        self._port, self.http_port = free_port(), free_port()
        self._environ = {
            **os.environ,
            **ENVIRON,
            "KVCACHED_HOST_POOL": str(POOL_BYTES),
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(
                (str(SITE), str(TESTS), os.environ.get("PYTHONPATH", ""))
            ),
            "RAY_AUTH_MODE": "disabled",  # a user's token would be asked for by the head alone
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # they would stand behind all other tests of the machine
            "RAY_raylet_start_wait_time_s": str(int(UP_SECONDS)),
        }
        self.nodes: dict[str, RayNode] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def start(self, name: str, *more: str) -> RayNode:
        """Start a node; the first one is the head."""
        words = [
            *("--num-cpus", "2", "--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--disable-usage-stats", "--min-worker-port", "0", "--max-worker-port", "0", *more),
            # A node that has to wait for its agents to name these gives up on a busy machine.
            *(word for option in PORTS for word in (option, str(free_port()))),
        ]
        if self.nodes:
            words += ["--address", f"127.0.0.1:{self._port}"]
            await_up(self._has_head, "the head", self.nodes[HEAD].log)
        else:
            words += ["--head", "--port", str(self._port), "--include-dashboard=false"]
            words += ["--ray-client-server-port", str(free_port())]
            words += ["--temp-dir", str(self.folder / "t")]
        node = self.nodes[name] = RayNode(self.folder, name, words, self._environ)
        return node

    def _has_head(self) -> bool:
        self.nodes[HEAD].check()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def await_nodes(self) -> None:
        """Wait until all nodes have started."""
        for name, node in self.nodes.items():
            await_up(node.has_started, f"node {name}", node.log)

    def serve(self) -> None:
        """Deploy the application with a file of Serve's, as `serve run` does."""
        file = self.folder / "serve.yaml"
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.http_port},
            "applications": [
                {
                    "name": "app",
                    "route_prefix": "/",
                    "import_path": "kvcached_ray:app",
                    "args": {"models": str(self.file)},
                }
            ],
        }
        file.write_text(json.dumps(config))  # which is YAML, too
        words = ["run", "--non-blocking", "--address", f"127.0.0.1:{self._port}", str(file)]
        done = subprocess.run(
            [PROGRAMS / "serve", *words],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=UP_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    @property
    def directory(self) -> Path:
        """What commands for all of it call it by."""
        return self.nodes[HEAD].directory / "cluster"

    def await_ready(self) -> None:
        """Wait until the application takes requests, and has a gateway on every node."""
        logs = [node.log for node in self.nodes.values()]
        await_up(self._is_ready, "the application", *logs)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5):  # noqa: S310
                devices = Client(self.directory, UP_SECONDS).devices()
        except (GatewayError, OSError):
            return False
        return {row.id.partition("/")[0] for row in devices} == set(self.nodes)

    def up(self) -> dict[str, set[str]]:
        """Return on which nodes each model has an engine that answers."""
        found: dict[str, set[str]] = {name: set() for name in self.extent.bases}
        for node in self.nodes.values():
            for name, row in node.rows().items():
                if name in found and row.state in {"warm", "busy", "yielded"}:
                    found[name].add(node.name)
        return found

    def engine_socket(self, name: str) -> str:
        """Return where a model's engine itself listens; the model is up on one node."""
        (node,) = self.up()[name]
        folder = self.nodes[node].directory / "gateway" / "engines"
        (path,) = folder.glob(f"{name}-*.sock")
        return str(path)

    def kill(self, name: str) -> RayNode:
        """Kill a node, with all that runs on it."""
        node = self.nodes.pop(name)
        node.kill()
        return node

    def close(self) -> None:
        """Kill all nodes, the head last."""
        for name in reversed(list(self.nodes)):
            self.kill(name)


@contextmanager
def ray_cluster(folder: Path, extent: Extent) -> Iterator[RayCluster]:
    """Serve from two nodes inside a block."""
    cluster = RayCluster(folder, extent)
    try:
        for name in (HEAD, OTHER):
            cluster.start(name)
        cluster.await_nodes()
        cluster.serve()
        cluster.await_ready()
        yield cluster
    finally:
        cluster.close()
