"""What the benchmarks of vLLM's servers share: the model, the servers, the client, the results.

The model has the shape of Llama-3.1-8B and dummy weights; `--tiny` is a rehearsal on vLLM's CPU
engine.
"""

import argparse
import asyncio
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from parts.record import Record, begin_record, command_line

from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.shapes import kv_bytes_per_token, make_shape

FIGURES = {
    "output_throughput": "output throughput",
    "mean_ttft_ms": "mean TTFT",
    "p99_ttft_ms": "p99 TTFT",
    "mean_tpot_ms": "mean TPOT",
    "p99_tpot_ms": "p99 TPOT",
}
QUIET_SECONDS = 2.0
READY_SECONDS = 600.0  # a GPU's servers compile
PREEMPTIONS = "vllm:num_preemptions_total"
SHORT_FOLDER = "/tmp"  # noqa: S108  the sockets of several processes need a short path
TINY_POOL_BYTES = 512 * MIB
# Symmetric memory would use multicast, which stays off on shared hosts.
WITHOUT_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0"}


class Setting:
    """What runs where: the model, the servers' arguments and the workloads."""

    def __init__(self, folder: Path, *, tiny: bool, runner: int | None, eager: bool) -> None:
        self.tiny = tiny
        self.environ = {"VLLM_LOGGING_LEVEL": "INFO"}
        self.servers = Servers(folder, TINY_POOL_BYTES if tiny else None)
        if tiny:
            self.model = make_model(folder / "tiny", seed=1)
            self.kv_bytes = 256 * MIB
            self.kv_bytes_per_token = KV_BYTES_PER_TOKEN
            self.workloads = [("saturation", 100, 16, "inf", 12), ("8 req/s", 100, 16, "8", 12)]
            self.options = VLLM.host_options
            self.environ["TMPDIR"] = SHORT_FOLDER
        else:
            self.model = make_shape(folder / "llama-8b", "llama-8b")
            self.kv_bytes = 24 * GIB
            self.kv_bytes_per_token = kv_bytes_per_token("llama-8b")
            self.workloads = [
                ("512/128 at saturation", 512, 128, "inf", 500),
                ("512/128 at 8 req/s", 512, 128, "8", 160),
                ("1913/162 at saturation", 1913, 162, "inf", 500),
            ]
            self.options = ("--load-format", "dummy", *VLLM.gpu_options(8192))
        if eager:
            self.options += ("--enforce-eager",)
        if runner is not None:
            self.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(runner - 1)

    def start(
        self, name: str, *, elastic: bool, kv_bytes: int | None = None, **more: str
    ) -> EngineServer:
        """Start a server with at most `kv_bytes` of KV cache; a vanilla one seizes them.

        Args:
            name: Its name.
            elastic: Whether it is ours.
            kv_bytes: What it may hold.
            more: More variables.
        """
        size = (kv_bytes or self.kv_bytes, self.kv_bytes_per_token)
        return self.servers.start(
            VLLM,
            name,
            self.model,
            *VLLM.caching(is_on=False),
            *VLLM.size(*size, is_elastic=elastic, is_host=self.tiny),
            is_elastic=elastic,
            limit_bytes=kv_bytes,
            options=self.options,
            environ=self.environ | more,
        )

    def bench(  # noqa: PLR0917  the workload is a tuple
        self, server: EngineServer, num_in: int, num_out: int, rate: str, num: int, seed: int
    ) -> dict[str, Any]:
        """Run `vllm bench serve` against a server and return its figures."""
        return bench_serve(server, self.model, num_in, num_out, rate, num, seed)


class Named(Protocol):
    """A server's address and what its model is called."""

    @property
    def url(self) -> str:
        """Where it answers."""

    @property
    def name(self) -> str:
        """The model's name."""


def bench_serve(  # noqa: PLR0917  the workload is a tuple
    server: Named,
    model: Path,
    num_in: int,
    num_out: int,
    rate: str,
    num: int,
    seed: int,
    *,
    is_even: bool = False,
) -> dict[str, Any]:
    """Run `vllm bench serve` against a server and return its figures.

    Args:
        server: The server.
        model: The model's folder, for its tokenizer.
        num_in: Tokens of each prompt.
        num_out: Tokens of each answer.
        rate: Requests per second, or `inf`.
        num: How many.
        seed: Of prompts and arrivals.
        is_even: Whether requests come at even distances; otherwise at random ones.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = [
        *("--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"),
        *("--model", server.name, "--tokenizer", str(model)),
        *("--dataset-name", "random", "--random-input-len", str(num_in)),
        *("--random-output-len", str(num_out), "--num-prompts", str(num)),
        *("--request-rate", rate, "--seed", str(seed), "--ignore-eos", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"),
        *(("--burstiness", "1e6") if is_even else ()),
    ]
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent):
        result = asyncio.run(main_async(parser.parse_args(words)))
    figures = {key: result[key] for key in (*FIGURES, "completed", "duration")}
    return figures | {"failed": num - result["completed"]}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all these benchmarks have."""
    made = command_line(description, can_rehearse=True)
    made.add_argument("--runner", type=int, choices=(1, 2), help="vLLM's model runner")
    made.add_argument(
        "--eager", action="store_true", help="no compilation: starts in half the time"
    )
    return made


def add_also(arguments: argparse.ArgumentParser) -> None:
    """Let a command line name further elastic engines; see `also_named`."""
    arguments.add_argument(
        "--also",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "VARIABLE=VALUE"),
        help="another elastic engine, with these settings",
    )


def also_named(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the settings of each engine that `--also` names."""
    return {name: dict(word.split("=", 1) for word in words) for name, *words in options.also}


@contextlib.contextmanager
def served(servers: Servers, record_path: Path) -> Iterator[None]:
    """End all servers behind the block, and keep the ends of their logs beside the results."""
    with servers:
        try:
            yield
        finally:
            servers.keep_logs(record_path.parent, record_path.stem)


@contextlib.contextmanager
def bench_run(options: argparse.Namespace) -> Iterator[tuple["Setting", Record]]:
    """Make a folder and a record; keep the ends of the servers' logs, also when it is cut off."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        record = begin_record(options)
        setting = Setting(
            Path(folder), tiny=options.tiny, runner=options.runner, eager=options.eager
        )
        with served(setting.servers, options.json):
            yield setting, record
