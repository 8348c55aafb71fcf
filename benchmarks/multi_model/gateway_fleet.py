"""Ours whole: `kvcached serve` in front of all models, whose weights yield."""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
from multi_model.client import Target
from multi_model.fleet import FIRST_PROMPT, Fleet
from parts.gateway_serve import ENGINE_BYTES, Gateway

from kvcached_core.errors import LedgerError
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.server import ENGINE_ENVIRON

# Until every model is up, and until every one could give its weights.
UP_SECONDS, COPIED_SECONDS = 1800.0, 600.0
LOOK_SECONDS = 0.2


class Served(Gateway):
    """A gateway whose models and engines are those of the benchmark's other modes.

    Args:
        fleet: What it serves, and where.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        site = fleet.site
        super().__init__(
            len(fleet.members),
            cards=1,
            tiny=site.is_host,
            headroom_bytes=site.device_bytes - site.cap_bytes,
            tiny_kv_bytes=0,
        )

    def _make(self, name: str, number: int) -> None:
        (self._folder / name).symlink_to(self._fleet.models[number].resolve())

    def settings(self, classes: Mapping[str, Any], class_of: Mapping[str, str]) -> dict[str, Any]:
        """Return what the file says; tiny models need no word of the host's memory."""
        found = super().settings(classes, class_of)
        if self._fleet.site.is_host:
            del found["host_memory"]
        else:
            files = (file for model in self._fleet.models for file in model.glob("*.safetensors"))
            copied_bytes = sum(file.stat().st_size for file in files)
            found["host_memory"] = str(copied_bytes + ENGINE_BYTES * len(self.names))
        return found

    def _environment(self, number: int) -> dict[str, Any]:
        """Return what an engine is started with: its member's words, as the gateway writes them."""
        member, site = self._fleet.members[number], self._fleet.site
        env = {name: value for name, value in member.environ.items() if name in KEPT}
        env |= ENGINE_ENVIRON | {
            "KVCACHED_HOST_BUDGET": os.environ.get("KVCACHED_HOST_BUDGET", "85%"),
            "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
            "KVCACHED_BUFFERS": "yield",
        }
        if site.is_host:
            env["KVCACHED_HOST_POOL"] = str(site.pool_bytes)
            env["VLLM_CPU_OMP_THREADS_BIND"] = str(number % (os.cpu_count() or 1))
            env |= VLLM.host_environ
        elif site.cap_bytes < site.device_bytes:
            env["KVCACHED_HEADROOM"] = str(site.device_bytes - site.cap_bytes)
        args = [*member.options, *member.arguments]
        return {"engine": "vllm", "python": VLLM.python, "env": env, "args": args}


# What of a member's variables is an engine's own; the gateway says the rest.
KEPT = ("VLLM_LOGGING_LEVEL", "DUMMY_SEED", "PYTHONPATH", "KVCACHED_PAGE_BYTES")


class GatewayFleet(Fleet):
    """All models behind one gateway, each of them up once before a replay begins."""

    _gateway: Served

    def _start_all(self) -> None:
        self._gateway = Served(self)
        self._stack.callback(self._gateway.close)
        self._stack.callback(self._gateway.keep_logs, self.folder, "gateway")
        self._stack.enter_context(self._gateway.serving())
        asyncio.run(self._warm())
        until = time.monotonic() + COPIED_SECONDS
        while not self._gateway.are_copied():
            if time.monotonic() > until:
                raise RuntimeError(f"weights were not copied within {COPIED_SECONDS:.0f} s")
            time.sleep(LOOK_SECONDS)  # a ledger's row does not tell when it changes

    async def _warm(self) -> None:
        """Ask each model once, all at the same time; the gateway starts as many as fit."""
        timeout = aiohttp.ClientTimeout(total=UP_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._ask(session, target) for target in self.targets))

    @staticmethod
    async def _ask(session: aiohttp.ClientSession, target: Target) -> None:
        body = target.dialect.body(target.name, list(FIRST_PROMPT), 1)
        async with session.post(target.url + target.dialect.path, json=body) as response:
            if response.status != 200:  # noqa: PLR2004
                raise RuntimeError(f"{target.name}: {(await response.text())[:300]}")

    @property
    def names(self) -> list[str]:
        """The models, as the gateway calls them; so are their instances."""
        return self._gateway.names

    @property
    def targets(self) -> list[Target]:
        """One address for all of them."""
        return [Target(self._gateway.url, name) for name in self._gateway.names]

    def num_preemptions(self) -> list[int | None]:
        """Return nothing: the engines' own addresses are the gateway's alone."""
        return [None] * len(self.members)

    def activations(self) -> tuple[int, float]:
        """Return how often weights came back so far, of all models, and what that took."""
        found = [row.activations for row in self._gateway.instances().values()]
        return sum(each.num for each in found), sum(each.seconds for each in found)

    def _resident_bytes(self) -> list[int]:
        rows: dict[str, Any] = {}
        with contextlib.suppress(LedgerError, OSError):
            rows = self._gateway.instances()
        return [
            rows[name].resident_bytes - rows[name].weights_bytes if name in rows else 0
            for name in self.names
        ]
