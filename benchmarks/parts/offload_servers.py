"""The servers of `offload.py`: with a host tier and without, and what is asked of them."""

import argparse
import itertools
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from multi_model.client import OPENAI, Dialect
from parts.offload_client import AT_ONCE, bench, schedule
from parts.record import Record
from parts.vllm_servers import READY_SECONDS, WITHOUT_MULTICAST, Setting
from vllm_overhead import is_elastic

from kvcached_core import control
from kvcached_core.ledger import bell
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.offload_plugin import TIERS_SPEC, add_plugin, transfer

PLAIN, DISK = "plain", "disk"  # elastic: without a tier, and with one on disk below the host's
COPIED = {
    word: (f"vllm:kv_offload_{word}_bytes_total", f"vllm:kv_offload_{word}_time_total")
    for word in ("store", "load")
}
SETTLED_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
LOOK_SECONDS = 0.001
PARTS = (0.5, 0.9)  # of what is given: when they were there


class Sizes:
    """How much of everything, on a GPU or in a rehearsal."""

    def __init__(self, options: argparse.Namespace) -> None:
        tiny = options.tiny
        self.disk_folder = Path(options.disk or "").absolute()
        self.rounds = options.rounds
        self.server_options: tuple[str, ...] = tuple(options.server_options)
        # Small pages: a prompt takes several, as on a GPU.
        self.environ: dict[str, str] = {"KVCACHED_PAGE_BYTES": "2MiB"} if tiny else {}
        if options.ranks > 1:
            cores = "|".join(str(rank) for rank in range(options.ranks))
            self.environ |= {"VLLM_CPU_OMP_THREADS_BIND": cores} if tiny else WITHOUT_MULTICAST
        self.tier_bytes = 128 * MIB if tiny else options.tier_gib * GIB
        self.kv_bytes = 128 * MIB if tiny else options.kv_gib * GIB
        # One long prompt of the 8B shape, and a quarter more.
        self.disk_host_bytes = 40 * MIB if tiny else options.long_tokens * 5 * GIB // 32_000
        self.given_bytes = 32 * MIB if tiny else 8 * GIB
        self.long_tokens = 1000 if tiny else options.long_tokens
        self.short_tokens = 400 if tiny else 8_000
        if tiny:
            self.workloads = [("100/16 at saturation", 100, 16, AT_ONCE, options.num_prompts // 5)]
        else:
            self.workloads = [
                ("2048/128 at saturation", 2048, 128, AT_ONCE, options.num_prompts),
                ("2048/128 at 4 req/s", 2048, 128, "4", options.num_prompts // 4),
            ]


class Kind(Protocol):
    """What differs between engines.

    Attributes:
        kv_bytes_per_token: Of the model.
        dialect: How a server is asked for a workload.
    """

    kv_bytes_per_token: int
    dialect: Dialect

    def start(self, name: str, sizes: Sizes, *, elastic: bool, has_tier: bool) -> None:
        """Start a server; one called `DISK` has its tier in `Sizes.disk_folder`."""

    def answer(self, server: EngineServer, prompt: list[int], num_tokens: int) -> list[int]:
        """Return the tokens of a greedy answer, or what stands for them."""

    def copied(self, server: EngineServer, word: str) -> tuple[float, float]:
        """Return how many bytes were stored or loaded so far, and in how many seconds."""

    def reset(self, server: EngineServer) -> None:
        """Drop the cache on the device, and not the host's."""


class VllmKind(Kind):
    """vLLM's servers."""

    dialect = OPENAI

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.kv_bytes_per_token = setting.kv_bytes_per_token

    def start(self, name: str, sizes: Sizes, *, elastic: bool, has_tier: bool) -> None:
        """See `Kind.start`."""
        setting = self._setting
        # vLLM's own copier needs a GPU.
        more = add_plugin(setting.servers.workspace / "plugin") if setting.tiny else {}
        size = VLLM.size(
            sizes.kv_bytes, self.kv_bytes_per_token, is_elastic=elastic, is_host=setting.tiny
        )
        length = () if setting.tiny else VLLM.longest(max(sizes.long_tokens, 8192) + 256)
        setting.servers.start(
            VLLM,
            name,
            setting.model,
            *VLLM.caching(is_on=True),
            *size,
            *length,
            *(self._disk(sizes) if name == DISK else self._tier(sizes) if has_tier else ()),
            *sizes.server_options,
            is_elastic=elastic,
            limit_bytes=sizes.kv_bytes,
            options=setting.options,
            environ=setting.environ | {"VLLM_SERVER_DEV_MODE": "1"} | sizes.environ | more,
        )

    def answer(self, server: EngineServer, prompt: list[int], num_tokens: int) -> list[int]:
        """See `Kind.answer`."""
        body = {
            "model": server.name,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = server.post("/v1/completions", body, PATIENCE_SECONDS)
        answer.raise_for_status()
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    def copied(self, server: EngineServer, word: str) -> tuple[float, float]:
        """See `Kind.copied`."""
        num_bytes, seconds = (server.metric(name) for name in COPIED[word])
        return (0.0, 0.0) if math.isnan(num_bytes) else (num_bytes, seconds)

    def reset(self, server: EngineServer) -> None:
        """See `Kind.reset`."""
        server.post("/reset_prefix_cache").raise_for_status()

    def _tier(self, sizes: Sizes) -> tuple[str, ...]:
        if not self._setting.tiny:
            return ("--kv-offloading-size", str(sizes.tier_bytes // GIB))
        return (
            "--kv-transfer-config",
            json.dumps(transfer(num_bytes=sizes.tier_bytes, delay_ms=(0, 5))),
        )

    def _disk(self, sizes: Sizes) -> tuple[str, ...]:
        below = [{"type": "fs", "root_dir": str(sizes.disk_folder)}]
        if self._setting.tiny:
            config = transfer(
                TIERS_SPEC, num_bytes=sizes.disk_host_bytes, delay_ms=(0, 5), secondary_tiers=below
            )
        else:
            extra = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": below}
            extra["cpu_bytes_to_use"] = sizes.disk_host_bytes
            config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
            config["kv_connector_extra_config"] = extra
        return ("--kv-transfer-config", json.dumps(config))


class Bench:
    """The servers, and what is asked of them.

    Args:
        setting: What runs where; of SGLang's servers it has its `kind` with it.
        record: The results.
        sizes: How much of everything.
    """

    def __init__(self, setting: Any, record: Record, sizes: Sizes) -> None:
        self.setting, self.record, self.sizes = setting, record, sizes
        self.kind: Kind = getattr(setting, "kind", None) or VllmKind(setting)
        self._random = random.Random(0)
        self._vocabulary = 500  # all shapes have these tokens

    @property
    def servers(self) -> Servers:
        """All of them."""
        servers: Servers = self.setting.servers
        return servers

    def start(self, names: list[str]) -> None:
        """Start the servers that the rows need, all at once."""
        sizes = self.sizes
        for name in names:
            elastic = name == PLAIN or is_elastic(name)
            self.kind.start(name, sizes, elastic=elastic, has_tier=name != PLAIN)
        ready = self.servers.wait_ready(seconds=READY_SECONDS)
        self.record.add(ready_seconds=ready, tier_bytes=sizes.tier_bytes, kv_bytes=sizes.kv_bytes)
        print(f"ready: {ready}", flush=True)
        for name in names:
            self.ask(self[name], self.prompt(64))
            self.bench(name, 64, 8, AT_ONCE, 8, seed=0)

    def __getitem__(self, name: str) -> EngineServer:
        return self.servers[name]

    def prompt(self, num_tokens: int) -> list[int]:
        """Return a prompt that no other one shares anything with."""
        return [self._random.randrange(3, self._vocabulary) for _ in range(num_tokens)]

    def ask(self, server: EngineServer, prompt: list[int]) -> float:
        """Return after how many seconds the first token of an answer was there."""
        started = time.perf_counter()
        self.kind.answer(server, prompt, 1)
        return time.perf_counter() - started

    def answer(self, server: EngineServer, prompt: list[int], num_tokens: int) -> list[int]:
        """Return the tokens of a greedy answer."""
        return self.kind.answer(server, prompt, num_tokens)

    def bench(self, name: str, *workload: Any, seed: int) -> dict[str, Any]:
        """Send a workload, what `schedule` takes, to a server; return its figures."""
        return bench(self[name], self.kind.dialect, schedule(*workload, seed), seed=seed)

    def copied(self, server: EngineServer, word: str) -> tuple[float, float]:
        """Return how many bytes were copied so far, and in how many seconds."""
        return self.kind.copied(server, word)

    def settle(self, server: EngineServer) -> None:
        """Wait until all that was computed is stored."""
        was = -1.0
        while (now := self.copied(server, "store")[0]) != was:
            was = now
            time.sleep(SETTLED_SECONDS)


def lose_cache(bench: Bench, name: str) -> list[int]:
    """Have a server give all that no request needs; return the bytes that each device has left."""
    directory = bench.servers.directory
    control.trim([name], directory=directory, wait_seconds=PATIENCE_SECONDS)
    rows = (row for device in control.devices(directory) for row in device.instances)
    return [row.resident_bytes for row in rows if row.name == name]


def give_back(bench: Bench, name: str, num_bytes: int) -> dict[str, Any]:
    """Ask a server for memory as a neighbour does; return after how many ms it was unmapped.

    As one that waits, it asks for the rest as soon as less is given and on its way: a server may
    keep a page that was about to go, for a request that has come meanwhile.

    Returns:
        `ms`, and the parts of it: when the first page went, and half and nine tenths of them; the
        longest time in which none did; what the calls that unmap took; how often it was asked.

    Raises:
        TimeoutError: If it did not give that much in `PATIENCE_SECONDS`.
    """
    with bench.setting.servers.open_ledger() as ledger:

        def look() -> InstanceView:
            (view,) = (one for one in ledger.view().instances if one.name == name)
            return view

        view = before = look()
        wanted = num_bytes // before.page_bytes * before.page_bytes
        started, given, num_asks = time.perf_counter(), 0, 0
        seen = [(0.0, 0)]  # when there was more, and how much
        while seen[-1][1] < wanted:
            lacking = wanted - given - view.coming_bytes
            if lacking > view.asked_bytes and ledger.ask(before.row, lacking):
                num_asks += 1
                bell.wake(ledger, [before.row])
            view, ms = look(), (time.perf_counter() - started) * 1e3
            given = view.num_unmapped_bytes - before.num_unmapped_bytes
            if given > seen[-1][1]:
                seen.append((ms, given))
            if ms > PATIENCE_SECONDS * 1e3:
                raise TimeoutError(
                    f"{name} gave {given} of {wanted} B in {PATIENCE_SECONDS} s; it holds "
                    f"{view.resident_bytes} B and uses {view.used_bytes} B"
                )
            time.sleep(LOOK_SECONDS)
        at = {part: next(ms for ms, given in seen if given >= part * wanted) for part in PARTS}
        moments = [ms for ms, _ in seen[1:]]
        return {
            "ms": seen[-1][0],
            "first_ms": moments[0] if moments else 0.0,
            "ms_by_part": at,
            "longest_pause_ms": max((b - a for a, b in itertools.pairwise(moments)), default=0.0),
            "num_asks": num_asks,
            "num_unmaps": view.unmap_times.num_calls - before.unmap_times.num_calls,
            "unmap_ms": (view.unmap_times.seconds - before.unmap_times.seconds) * 1e3,
        }
