"""The demo's servers, forked from a parent that has imported their engine."""

from collections.abc import Mapping
from typing import Any

from helpers.nursery import start_warm
from kvcached_demo.harness.server import EngineServer, SGLangServer


class WarmServer(EngineServer):
    """`vllm serve`; what a start costs beside imports is all that is left of it."""

    engine = "vllm"

    def start_process(self, command: list[str], environ: Mapping[str, str]) -> Any:
        """See `EngineServer`."""
        python, *words = command
        with self.log.open("wb") as log:
            output = log.fileno()
            return start_warm(
                self.engine, words, environ, output=output, errors=output, python=python
            )


class WarmSGLangServer(WarmServer, SGLangServer):
    """`sglang.launch_server`."""

    engine = "sglang"
