"""How a device is shared out: what each mode starts its servers with."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multi_model import upstream
from multi_model.errors import ModeError
from parts.yielding_servers import with_tests

from kvcached_core.units import GIB, format_bytes
from kvcached_demo.harness.engines import ENGINES, SGLANG, VLLM, Engine
from kvcached_demo.harness.plan import Plan, plan

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.offload_plugin import add_plugin, transfer

STATIC, STATIC_TUNED, ELASTIC = "static", "static-tuned", "elastic"
ALONE, SLEEP_SWAP, SWAP = "alone", "sleep-swap", "swap"
GATEWAY, UPSTREAM, OFFLOAD = "gateway", "upstream", "offload"
MODES = {
    STATIC: "vanilla engines, the device split evenly",
    STATIC_TUNED: "vanilla engines, the device split by what each needs on average",
    ELASTIC: "ours: all engines share what is free, weights stand still",
    OFFLOAD: "as elastic, and each engine keeps copies of its prefix cache in host memory",
    GATEWAY: "ours whole: one gateway, engines share what is free, weights yield",
    UPSTREAM: f"the kvcached of ovg-project, {upstream.VERSION}, in an environment of its own",
    ALONE: "each model with the device to itself: the ideal, and the base of service levels",
    SLEEP_SWAP: "vanilla engines in sleep mode, one awake at a time",
    SWAP: "vanilla engines, one running at a time, first come, first served, as llama-swap does",
}
# The modes that kvcached is in.
OURS = (GATEWAY, OFFLOAD, ELASTIC)
# Those of them in which engines stand by themselves.
SHARED = (ELASTIC, OFFLOAD)
AGAIN = "-again"
GPU_TOKENS = 4096  # of the longest request
# What a sleeping engine still holds: its context, graphs and buffers. An operator leaves room.
SLEEPING_BYTES = 3 * GIB


def again(mode: str) -> str:
    """Return the name of a mode's second run: the control, which says what noise is."""
    return f"{mode}{AGAIN}"


@dataclass(frozen=True)
class Site:
    """Where it runs and how much there is.

    Attributes:
        is_host: Whether it is host memory and CPU engines.
        kv_bytes_per_token: Bytes of a token in all layers.
        pool_bytes: What all KV caches may hold together; None splits the device as an operator
            does, by `--gpu-memory-utilization`.
        device_bytes: Memory of the GPU.
        cap_bytes: The part of it that this run may use; the rest is left alone.
        caching: Whether prefix caching is on.
        options: More arguments of every server.
        page_bytes: The page size that elastic engines aim at; the default where it is empty.
        upstream_python: The interpreter that has the other kvcached.
        tier_bytes: Host memory of each engine for copies of its prefix cache, in mode `offload`.
        weights_bytes: Of the largest model; 0 on a host, where nobody asks.
        num_awake: How many models are awake at a time in mode `sleep-swap`.
        sleeping_bytes: Room for what an engine holds there beside weights and KV cache.
    """

    is_host: bool
    kv_bytes_per_token: int
    pool_bytes: int | None
    device_bytes: int = 0
    cap_bytes: int = 0
    caching: bool = False
    options: tuple[str, ...] = ()
    page_bytes: str = ""
    upstream_python: str = ""
    tier_bytes: int = 0
    weights_bytes: int = 0
    num_awake: int = 1
    sleeping_bytes: int = SLEEPING_BYTES

    def num_starting(self, chosen: "Sequence[Member]") -> int:
        """Return how many engines in sleep mode may start at a time, those before them asleep.

        A start is not measured, so all of the device counts, also what the run may not use.
        """
        most = max((member.kv_bytes or 0 for member in chosen), default=0)
        if self.is_host or not most:
            return 1
        free_bytes = self.device_bytes - len(chosen) * self.sleeping_bytes
        return max(free_bytes // (self.weights_bytes + most), 1)


@dataclass(frozen=True)
class Member(Plan):
    """How one server of a mode is started.

    Attributes:
        starts_alone: Whether the one before has to be ready first, because it looks at the device.
        kv_bytes: What it seizes for its KV cache, or None if that is up to it.
        python: The interpreter that starts it; where it is empty the one that has its engine.
    """

    starts_alone: bool = False
    kv_bytes: int | None = None
    python: str = ""


def members(  # noqa: PLR0917  what a mode is made of
    mode: str,
    site: Site,
    kinds: Sequence[str],
    shares: Sequence[float],
    folder: Path,
    weights_bytes: Sequence[int] = (),
) -> list[Member]:
    """Return how a mode's servers are started.

    Args:
        mode: One of `MODES`; `alone` gives every server the whole device, one at a time.
        site: Where.
        kinds: The engine of each model.
        shares: Each model's part of the KV memory for `static-tuned`.
        folder: Where the ledger lies.
        weights_bytes: Of each model; all are of the largest one's size where it is left out.

    Raises:
        ModeError: If the mode cannot be run here.
    """
    if mode not in MODES:
        raise ModeError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    _refuse(mode, site, kinds)
    num = len(kinds)
    parts = [1.0] * num
    if mode == STATIC:
        parts = [1 / num] * num
    elif mode == STATIC_TUNED:
        parts = _parts_by_need(site, shares, weights_bytes or [site.weights_bytes] * num)
    elif mode == SLEEP_SWAP:
        parts = [_part_beside_sleepers(site, num - site.num_awake)] * num
    return [
        _member(f"m{model}", ENGINES[kind], mode, site, part, folder)
        for model, (kind, part) in enumerate(zip(kinds, parts, strict=True))
    ]


def _parts_by_need(
    site: Site, shares: Sequence[float], weights_bytes: Sequence[int]
) -> list[float]:
    """Return what part of all each engine takes if KV memory is split by need.

    Each has what it cannot do without; the rest goes by the shares. That is room for one request,
    and where the device is split also the weights and what else an engine holds.

    Raises:
        ModeError: If there is no rest.
    """
    if site.is_host or site.pool_bytes is not None:
        all_bytes = site.pool_bytes or 0
        least = [GPU_TOKENS * site.kv_bytes_per_token] * len(shares)
    else:
        all_bytes = site.cap_bytes
        least = [weights + SLEEPING_BYTES for weights in weights_bytes]
    rest_bytes = all_bytes - sum(least)
    if rest_bytes <= 0:
        needed = format_bytes(sum(least))
        raise ModeError(f"{STATIC_TUNED}: {len(shares)} models need {needed} at least")
    return [
        (own + share * rest_bytes) / all_bytes for own, share in zip(least, shares, strict=True)
    ]


def _part_beside_sleepers(site: Site, num_sleepers: int) -> float:
    """Return what part of all each engine that is awake may take while so many others sleep.

    Raises:
        ModeError: If these leave nothing.
    """
    if num_sleepers < 0:
        num = num_sleepers + site.num_awake
        raise ModeError(f"{SLEEP_SWAP}: of {num} models {site.num_awake} cannot be awake")
    if site.is_host or site.pool_bytes is not None:
        return 1.0 / site.num_awake
    part = (1.0 - num_sleepers * site.sleeping_bytes / site.cap_bytes) / site.num_awake
    if part * site.cap_bytes <= site.weights_bytes + site.sleeping_bytes:
        held = format_bytes(num_sleepers * site.sleeping_bytes)
        said = f"{num_sleepers} models that sleep hold {held}: no KV cache has room"
        raise ModeError(f"{SLEEP_SWAP}: {said} beside the weights of {site.num_awake}")
    return part


def _refuse(mode: str, site: Site, kinds: Sequence[str]) -> None:
    """Refuse what a mode cannot do here.

    Raises:
        ModeError: If it cannot be run.
    """
    if mode in {SLEEP_SWAP, GATEWAY, UPSTREAM, OFFLOAD} and SGLANG.name in kinds:
        raise ModeError(f"{mode} is made of vLLM's engines here; --engines vllm has them alone")
    if mode in {GATEWAY, UPSTREAM} and site.pool_bytes is not None and not site.is_host:
        raise ModeError(f"{mode} has no pool for KV caches alone; --cap-gib says what all may use")
    if mode == OFFLOAD and not (site.caching and site.tier_bytes):
        raise ModeError(f"{OFFLOAD} has nothing to copy, or no room: --caching and --tier-gib")
    if mode == UPSTREAM:
        if site.is_host:
            raise ModeError(f"{UPSTREAM} needs a GPU")
        upstream.check(site.upstream_python, VLLM.release())


def _member(name: str, engine: Engine, mode: str, site: Site, part: float, folder: Path) -> Member:  # noqa: PLR0917  what a member is made of
    kv_bytes = None if site.pool_bytes is None else int(site.pool_bytes * part)
    if mode == SLEEP_SWAP and kv_bytes is None:
        kv_bytes = int(site.cap_bytes * part) - site.weights_bytes - site.sleeping_bytes
    environ = {"VLLM_LOGGING_LEVEL": "WARNING"}
    options = ("--load-format", "dummy", *engine.gpu_options(GPU_TOKENS))
    if site.is_host:  # one process for each server: every further one imports vLLM again
        environ |= engine.host_environ
        options = engine.host_options
    elif engine is SGLANG:
        options += ("--cuda-graph-max-bs-decode", "256")
    if engine is VLLM and not site.is_host:  # each model has weights of its own
        options += ("--worker-extension-cls", "helpers.seeded.Seeded")
        environ |= {"DUMMY_SEED": name.removeprefix("m"), "PYTHONPATH": with_tests()}
    is_elastic = mode in OURS
    if is_elastic:
        environ |= _elastic_environ(site)
        kv_bytes = None
    more: tuple[str, ...] = ()
    if mode == SLEEP_SWAP:  # a CPU's engine refuses the flag; asked to sleep, it does nothing
        more = () if site.is_host else ("--enable-sleep-mode",)
        environ["VLLM_SERVER_DEV_MODE"] = "1"
    if mode == OFFLOAD:
        more, variables = _tier(site, folder)
        environ |= variables
    if mode == UPSTREAM:
        options = options[:-2]  # its processes have nothing of ours
        environ |= upstream.environ(name, site.cap_bytes, site.device_bytes)
    found = plan(
        engine,
        name,
        folder,
        *engine.caching(is_on=site.caching),
        *site.options,
        *(() if mode == UPSTREAM else _size(engine, site, kv_bytes, part, is_elastic=is_elastic)),
        *more,
        is_elastic=is_elastic,
        pool_bytes=site.pool_bytes if site.is_host else None,
        options=options,
        environ=environ,
    )
    return Member(
        **vars(found),
        starts_alone=not is_elastic and kv_bytes is None,
        kv_bytes=kv_bytes,
        python=site.upstream_python if mode == UPSTREAM else "",
    )


def _tier(site: Site, folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the arguments and variables of a host tier; vLLM's own copier needs a GPU."""
    if not site.is_host:
        return ("--kv-offloading-size", f"{site.tier_bytes / GIB:g}"), {}
    config = transfer(num_bytes=site.tier_bytes, delay_ms=(0, 1))
    return ("--kv-transfer-config", json.dumps(config)), add_plugin(folder / "plugin")


def _elastic_environ(site: Site) -> dict[str, str]:
    environ = {}
    if site.page_bytes:
        environ["KVCACHED_PAGE_BYTES"] = site.page_bytes
    if not site.is_host and site.cap_bytes < site.device_bytes:
        environ["KVCACHED_HEADROOM"] = str(site.device_bytes - site.cap_bytes)
    return environ


def _size(
    engine: Engine, site: Site, kv_bytes: int | None, part: float, *, is_elastic: bool
) -> tuple[str, ...]:
    share = "--gpu-memory-utilization" if engine is VLLM else "--mem-fraction-static"
    if is_elastic and not site.is_host:
        return ()
    if kv_bytes is None and not is_elastic:
        return (share, f"{part * site.cap_bytes / site.device_bytes:.3f}")
    size = engine.size(
        kv_bytes or site.pool_bytes or 0,
        site.kv_bytes_per_token,
        is_elastic=is_elastic,
        is_host=site.is_host,
    )
    return size if site.is_host or engine is VLLM else (*size, share, "0.9")


def describe(site: Site) -> str:
    """Say what there is to share."""
    if site.pool_bytes is not None:
        return f"{format_bytes(site.pool_bytes)} for all KV caches together"
    return f"{site.cap_bytes / GIB:.0f} GiB of the device, weights and KV caches together"
