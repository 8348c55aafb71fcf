"""Two of vLLM's servers on one device, of which one sleeps and the other fills it."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from parts.giving import wait_offered
from parts.record import Record
from parts.vllm_servers import SHORT_FOLDER, kv_bytes_per_token, make_shape
from parts.yielding_servers import with_tests

from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import Completion, make_burst
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

if TYPE_CHECKING:
    from concurrent.futures import Future

SLEEPER, NEIGHBOUR = "sleeper", "neighbour"
EXTENSION = ("--worker-extension-cls", "helpers.filling.Filling")
FULL_BYTES = 256 * MIB
WAKE_SECONDS = 60.0
PROMPT = (1, 300, 12)  # requests, their tokens, and what each of them gets


@dataclass(frozen=True)
class Size:
    """What differs between a GPU and a rehearsal.

    Attributes:
        room_bytes: What the neighbour's cache may have while the sleeper is awake.
        kv_bytes_per_token: Of the model, in all layers.
        num_prompt_tokens: Of a prompt that fills the cache.
        num_busy_tokens: What each request of the busy neighbour generates.
        asleep_bytes: What the sleeper's wake pretends to need; 0: what it really needs.
    """

    room_bytes: int
    kv_bytes_per_token: int
    num_prompt_tokens: int
    num_busy_tokens: int
    asleep_bytes: int = 0


GPU = Size(14 * GIB, kv_bytes_per_token("llama-3b"), 6000, 1500)
TINY = Size(256 * MIB, KV_BYTES_PER_TOKEN, 1500, 400, asleep_bytes=128 * MIB)


class Run:
    """The servers, the ballast and what became of them."""

    def __init__(
        self,
        folder: Path,
        record: Record,
        *,
        tiny: bool,
        room_bytes: int | None = None,
        is_yielding: bool = False,
    ) -> None:
        self.folder, self.record, self.tiny = folder, record, tiny
        self.size = TINY if tiny else GPU
        if room_bytes is not None:
            self.size = replace(self.size, room_bytes=room_bytes)
        self.is_yielding = is_yielding
        pool_bytes = self.size.room_bytes + 2 * self.size.asleep_bytes
        self.servers = Servers(folder, pool_bytes if tiny else None)
        self.ballast: Any = None
        self.seed = 1000
        self.num_failed = 0
        self._pool = ThreadPoolExecutor(4)
        place = folder / "model"
        self.model = make_model(place, seed=1) if tiny else make_shape(place, "llama-3b")

    def start(self, name: str, *arguments: str, model: Path | None = None) -> EngineServer:
        """Start an elastic server."""
        environ = {
            "TMPDIR": SHORT_FOLDER,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "PYTHONPATH": with_tests(),
        }
        if self.is_yielding:
            environ["KVCACHED_WEIGHTS"] = "yield"
        options = ("--load-format", "dummy", *VLLM.gpu_options(8192), "--enforce-eager")
        options += VLLM.running(256)
        if self.tiny:
            options = VLLM.host_options
            environ |= VLLM.host_environ
        return self.servers.start(
            VLLM,
            name,
            model or self.model,
            *EXTENSION,
            *arguments,
            options=options,
            environ=environ,
        )

    def close(self) -> None:
        """End every server, and keep the ends of their logs beside the results."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.servers.kill()
        self.servers.keep_logs(self.record.path.parent, self.record.path.stem)

    def post(
        self, name: str, path: str, timeout: float = WAKE_SECONDS, **body: Any
    ) -> httpx.Response:
        """Post to a server."""
        return self.servers[name].post(path, body or None, timeout)

    def call(self, name: str, method: str, *args: str) -> None:
        """Call a method of a server's workers."""
        self.post(name, "/collective_rpc", method=method, args=list(args)).raise_for_status()

    def send(self, name: str, num: int, num_in: int, num_out: int, seed: int) -> list[Completion]:
        """Send requests at once and wait for them."""
        burst = make_burst(
            num_requests=num, num_prompt_tokens=num_in, num_output_tokens=num_out, seed=seed
        )
        return asyncio.run(self.servers[name].send(burst))

    def send_meanwhile(
        self, name: str, num: int, num_in: int, num_out: int, seed: int
    ) -> "Future[list[Completion]]":
        """Send requests, and go on."""
        return self._pool.submit(self.send, name, num, num_in, num_out, seed)

    def view(self) -> tuple[DeviceView, dict[str, InstanceView]]:
        """Return what the ledger says."""
        device = self.servers.device()
        return device, {row.name: row for row in device.instances}

    def answers(self, name: str) -> list[list[int]]:
        """Return what a server answers to two prompts, one after the other.

        Its prefix cache is emptied first: what is found there is computed in other batches.
        """
        self.post(name, "/reset_prefix_cache").raise_for_status()
        return [self.send(name, *PROMPT, seed)[0].token_ids for seed in range(2)]

    def load_ballast(self, room_bytes: int) -> None:
        """Take what is free on the device, but `room_bytes`."""
        if self.tiny:
            return
        import torch

        self.ballast = None
        torch.cuda.empty_cache()
        device, _ = self.view()
        num_bytes = max(device.free_bytes - room_bytes, 0)
        self.ballast = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

    def wait_offered(self) -> None:
        """Wait until the weights that yield are offered: host memory has a copy of them."""
        if self.is_yielding:
            wait_offered(lambda: self.servers.device().instances, WAKE_SECONDS)

    def fill(self) -> int:
        """Let the neighbour's prefix cache have all there is; return how much it holds then."""
        held = -1
        while True:
            device, rows = self.view()
            free, resident = device.free_bytes, rows[NEIGHBOUR].resident_bytes
            if free < FULL_BYTES // (64 if self.tiny else 1) or resident == held:
                return resident
            held = resident
            tokens = free // self.size.kv_bytes_per_token
            num = min(max(tokens // self.size.num_prompt_tokens + 1, 2), 24)
            self.seed += 1
            done = self.send(NEIGHBOUR, int(num), self.size.num_prompt_tokens, 1, self.seed)
            self.num_failed += sum(one.error is not None for one in done)

    def fall_asleep(self, level: int) -> None:
        """Put the sleeper to sleep."""
        self.post(SLEEPER, f"/sleep?level={level}").raise_for_status()
        if self.size.asleep_bytes:
            self.call(SLEEPER, "pretend_asleep", str(self.size.asleep_bytes))

    def wake(self, level: int) -> tuple[int, str, float]:
        """Wake the sleeper; return the status, the text and the seconds it took."""
        start = time.perf_counter()
        answer = self.post(SLEEPER, "/wake_up")
        seconds = time.perf_counter() - start
        if answer.status_code == httpx.codes.OK:
            if self.size.asleep_bytes:
                self.call(SLEEPER, "pretend_asleep", "0")
            elif level == 2:  # noqa: PLR2004  whoever wakes an engine from there loads its weights
                self.call(SLEEPER, "fill_weights")
        return answer.status_code, answer.text, seconds

    def is_well(self) -> bool:
        """Return whether the sleeper's server answers, and says that it sleeps."""
        asleep = httpx.get(f"{self.servers[SLEEPER].url}/is_sleeping", timeout=10).json()
        return self.servers[SLEEPER].is_ready() and bool(asleep["is_sleeping"])
