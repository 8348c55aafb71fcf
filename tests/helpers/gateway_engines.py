"""Real engines on the CPU for tests of the gateway's data path, and questions to them."""

import asyncio
import io
import json
import os
import re
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from helpers.nursery import WarmProcess, start_warm
from helpers.waiting import PATIENCE_SECONDS
from kvcached_demo.harness.engines import SGLANG, VLLM
from kvcached_demo.harness.server import ENGINE_ENVIRON, free_port
from kvcached_gateway.lease import Address

READY_SECONDS = PATIENCE_SECONDS
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
GREEDY = {"temperature": 0, "max_tokens": 8}
# What differs between two answers to one request.
OF_ITS_OWN = re.compile(
    rb'(?<="created":)\d+|(?<="created_at":)[\d.]+|(?<="completed_at":)[\d.]+|[0-9a-f]{16,}'
    rb"|\d+\.\d{6,}"  # times within an answer
)


@dataclass
class RealEngine:
    """An engine that runs.

    Attributes:
        address: Where it listens.
        process: The leader of its process group.
        log: What it says.
        running: The counter of its requests that run.
        generated: The counter of tokens that it answered.
    """

    address: Address
    process: WarmProcess
    log: Path
    running: str
    generated: str

    def session(self) -> aiohttp.ClientSession:
        """Return a client of this engine alone."""
        socket = self.address.socket
        return aiohttp.ClientSession(
            base_url=self.address.url,
            headers=self.address.headers,
            connector=aiohttp.UnixConnector(socket) if socket else None,
        )

    async def is_ready(self) -> bool:
        try:
            async with self.session() as session, session.get("/health") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def wait_ready(self) -> None:
        async with asyncio.timeout(READY_SECONDS):
            while not await self.is_ready():
                if self.process.poll() is not None:
                    raise RuntimeError(self.log.read_text()[-3000:])
                await asyncio.sleep(0.2)  # nobody tells when it listens

    async def counter(self, name: str) -> float:
        async with self.session() as session, session.get("/metrics") as answer:
            text = await answer.text()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if name in line)

    async def await_idle(self) -> None:
        """Wait until no request runs, as its own counters say."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.counter(self.running):  # noqa: ASYNC110  a counter calls nobody
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        """End every process of it at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _environ(**more: str) -> dict[str, str]:
    return {**os.environ, **ENGINE_ENVIRON, "ENABLE_KVCACHED": "0", **more}


def _start(engine: str, words: list[str], environ: Mapping[str, str], log: Path) -> WarmProcess:
    python = {"vllm": VLLM, "sglang": SGLANG}[engine].python
    with log.open("wb") as file:
        output = file.fileno()
        return start_warm(engine, words, environ, output=output, errors=output, python=python)


def start_vllm(model: Path, *, name: str = "tiny") -> RealEngine:
    """Start vLLM on a Unix socket, whose path has to be short."""
    folder = Path(tempfile.mkdtemp(prefix="kvcached-"))
    socket, log = folder / "vllm.sock", folder / "vllm.log"
    words = [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model), "--uds", str(socket)),
        *("--served-model-name", name, "--disable-uvicorn-access-log", *VLLM.host_options),
        *("--kv-cache-memory-bytes", str(128 << 20), "--gpu-memory-utilization", "0.5"),
        *("--chat-template", CHAT_TEMPLATE),
    ]
    process = _start("vllm", words, _environ(**VLLM.host_environ, TMPDIR=str(folder)), log)
    address = Address("http://localhost", str(socket))
    return RealEngine(
        address, process, log, "vllm:num_requests_running{", "vllm:generation_tokens_total{"
    )


def start_sglang(model: Path, *, name: str = "tiny") -> RealEngine:
    """Start SGLang on the loopback, with a key that only this process knows."""
    folder = Path(tempfile.mkdtemp(prefix="kvcached-"))
    log, template, port = folder / "sglang.log", folder / "chat.jinja", free_port()
    template.write_text(CHAT_TEMPLATE)
    options = [word for word in SGLANG.host_options if word != "--skip-tokenizer-init"]
    words = [
        *("-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", name),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key", "of-the-engine", *options),
        *("--max-total-tokens", "4096", "--mem-fraction-static", "0.3", "--enable-metrics"),
        *("--chat-template", str(template)),
    ]
    variables = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "TRITON_INTERPRET": "1",
    }  # as others' warm parent has
    environ = _environ(**variables, TMPDIR=str(folder))
    address = Address(f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer of-the-engine"})
    return RealEngine(
        address,
        _start("sglang", words, environ, log),
        log,
        "sglang:num_running_reqs{",
        "sglang:generation_tokens_total{",
    )


@dataclass(frozen=True)
class Said:
    """An answer, without what differs between two answers to one request."""

    status: int
    content_type: str | None
    body: bytes


async def ask(session: aiohttp.ClientSession, path: str, body: Any) -> Said:
    """Ask an engine, or a gateway in front of it."""
    headers = {"X-Request-Id": "0", "Content-Type": "application/json"}
    data = io.BytesIO(json.dumps(body).encode())
    async with session.post(path, data=data, headers=headers) as answer:
        whole = await answer.read()
        content_type = answer.headers.get("Content-Type")
        return Said(answer.status, content_type, OF_ITS_OWN.sub(b"~", whole))


def public_bodies(model: str) -> dict[str, dict[str, Any]]:
    """Return a body for each public path that a model of text has; others get `GREEDY`."""
    greedy = GREEDY | {"model": model}
    chat = greedy | {"messages": [{"role": "user", "content": "memory follows the load"}]}
    text = {"model": model, "prompt": "memory follows"}
    tokens = {"model": model, "tokens": [300, 301]}
    return {
        "/v1/chat/completions": chat,
        "/v1/completions": greedy | {"prompt": "memory follows the load"},
        "/v1/responses": {
            "model": model,
            "input": "memory",
            "max_output_tokens": 8,
            "temperature": 0,
        },
        "/v1/messages": chat,
        "/v1/messages/count_tokens": chat,
        "/v1/embeddings": {"model": model, "input": "memory"},
        **dict.fromkeys(("/tokenize", "/v1/tokenize"), text),
        **dict.fromkeys(("/detokenize", "/v1/detokenize"), tokens),
    }
