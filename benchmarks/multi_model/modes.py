"""How a device is shared out: what each mode starts its servers with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_servers import seizing

from kvcached_core.units import GIB, format_bytes
from kvcached_demo.harness.server import HOST_OPTIONS, SGLANG_HOST_OPTIONS

STATIC, STATIC_TUNED, ELASTIC = "static", "static-tuned", "elastic"
ALONE, SLEEP_SWAP = "alone", "sleep-swap"
MODES = {
    STATIC: "vanilla engines, the device split evenly",
    STATIC_TUNED: "vanilla engines, the device split by what each needs on average",
    ELASTIC: "ours: all engines share what is free",
    ALONE: "each model with the device to itself: the ideal, and the base of service levels",
    SLEEP_SWAP: "vanilla engines in sleep mode, one awake at a time",
}
VLLM, SGLANG = "vllm", "sglang"

VLLM_GPU_OPTIONS = ("--load-format", "dummy", "--max-model-len", "4096")
SGLANG_GPU_OPTIONS = (
    *("--load-format", "dummy", "--dtype", "bfloat16", "--context-length", "4096"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--log-level", "info", "--cuda-graph-max-bs-decode", "256"),
)


class ModeError(ValueError):
    """A mode that cannot be run here; the message says why and what can."""


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
    """

    is_host: bool
    kv_bytes_per_token: int
    pool_bytes: int | None
    device_bytes: int = 0
    cap_bytes: int = 0
    caching: bool = False
    options: tuple[str, ...] = ()
    page_bytes: str = ""


@dataclass(frozen=True)
class Plan:
    """How one server is started.

    Attributes:
        name: The model's and the instance's name.
        kind: `vllm` or `sglang`.
        arguments: The engine's arguments.
        environ: Variables.
        options: What comes before the arguments.
        starts_alone: Whether the one before has to be ready first, because it looks at the device.
        kv_bytes: What it seizes for its KV cache, or None if that is up to it.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    starts_alone: bool = False
    kv_bytes: int | None = None


def plan(
    mode: str, site: Site, kinds: Sequence[str], shares: Sequence[float], folder: Path
) -> list[Plan]:
    """Return how a mode's servers are started.

    Args:
        mode: One of `MODES`; `alone` gives every server the whole device, one at a time.
        site: Where.
        kinds: The engine of each model.
        shares: Each model's part of the device for `static-tuned`.
        folder: Where the ledger lies.

    Raises:
        ModeError: If the mode cannot be run here.
    """
    if mode not in MODES:
        raise ModeError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if mode == SLEEP_SWAP and (site.is_host or SGLANG in kinds):
        raise ModeError(f"{SLEEP_SWAP} needs vLLM's sleep mode, which only its GPU engine has")
    num = len(kinds)
    parts = {STATIC: [1 / num] * num, STATIC_TUNED: list(shares)}.get(mode, [1.0] * num)
    return [
        _plan(f"m{model}", kind, mode, site, part, folder)
        for model, (kind, part) in enumerate(zip(kinds, parts, strict=True))
    ]


def _plan(name: str, kind: str, mode: str, site: Site, part: float, folder: Path) -> Plan:  # noqa: PLR0917  what a plan is made of
    environ = {"ENABLE_KVCACHED": "0", "KVCACHED_DIR": str(folder / "kv")}
    if site.is_host:  # one process for each server: every further one imports vLLM again
        environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        environ |= {"TMPDIR": "/tmp", "SGLANG_USE_CPU_ENGINE": "0"}  # noqa: S108  sockets
    arguments: tuple[str, ...] = (*_caching(kind, is_on=site.caching), *site.options)
    kv_bytes = None if site.pool_bytes is None else int(site.pool_bytes * part)
    if mode == ELASTIC:
        more, own = _elastic(name, kind, site)
        environ |= own
        kv_bytes = None
    else:
        more = _seizing(kind, site, kv_bytes, part)
    if mode == SLEEP_SWAP:
        more += ("--enable-sleep-mode",)
        environ["VLLM_SERVER_DEV_MODE"] = "1"
    return Plan(
        name,
        kind,
        arguments + more,
        environ,
        _options(kind, site),
        starts_alone=mode != ELASTIC and (kv_bytes is None or mode == SLEEP_SWAP),
        kv_bytes=kv_bytes,
    )


def _options(kind: str, site: Site) -> tuple[str, ...]:
    if site.is_host:
        return HOST_OPTIONS if kind == VLLM else SGLANG_HOST_OPTIONS
    return VLLM_GPU_OPTIONS if kind == VLLM else SGLANG_GPU_OPTIONS


def _caching(kind: str, *, is_on: bool) -> tuple[str, ...]:
    if kind == SGLANG:
        return () if is_on else ("--disable-radix-cache",)
    return ("--enable-prefix-caching",) if is_on else ("--no-enable-prefix-caching",)


def _elastic(name: str, kind: str, site: Site) -> tuple[tuple[str, ...], dict[str, str]]:
    environ = {"ENABLE_KVCACHED": "1", "KVCACHED_NAME": name}
    if site.page_bytes:
        environ["KVCACHED_PAGE_BYTES"] = site.page_bytes
    if site.is_host:
        environ["KVCACHED_HOST_POOL"] = str(site.pool_bytes)
    elif site.cap_bytes < site.device_bytes:
        environ["KVCACHED_HEADROOM"] = str(site.device_bytes - site.cap_bytes)
    if kind == VLLM:
        return (), environ
    del environ["ENABLE_KVCACHED"]
    return ("--enable-kvcached", "--kvcached-name", name), environ


def _seizing(kind: str, site: Site, kv_bytes: int | None, part: float) -> tuple[str, ...]:
    if kv_bytes is None:
        fraction = f"{part * site.cap_bytes / site.device_bytes:.3f}"
        name = "--gpu-memory-utilization" if kind == VLLM else "--mem-fraction-static"
        return (name, fraction)
    if kind == SGLANG:
        fraction = "0.3" if site.is_host else "0.9"
        tokens = str(kv_bytes // site.kv_bytes_per_token)
        return ("--max-total-tokens", tokens, "--mem-fraction-static", fraction)
    return seizing(kv_bytes, is_host=site.is_host)


def describe(site: Site) -> str:
    """Say what there is to share."""
    if site.pool_bytes is not None:
        return f"{format_bytes(site.pool_bytes)} for all KV caches together"
    return f"{site.cap_bytes / GIB:.0f} GiB of the device, weights and KV caches together"
