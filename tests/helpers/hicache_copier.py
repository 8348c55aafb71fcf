"""A copier for SGLang's HiCache that runs on a CPU: rows are copied in a thread, after a delay.

SGLang's own need a GPU: memory that CUDA has pinned, kernels that copy, and streams. Its tree, its
controller, its host pool, its storage and its scheduler are its own. A copy of a page that was
unmapped meanwhile ends the process, and rows that are loaded as others than were stored fail.
"""

import json
import os
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.hicache_copier_settings import (
    DEFECT,
    DELAY_MS,
    GATE,
    REPORT,
    SEED,
    SPOILED,
    UNMAPPED,
)
from helpers.host_streams import Gate, HostStreams


@dataclass
class Counts:
    """What was copied, in rows of all layers, and the first fault."""

    stored_rows: int = 0
    loaded_rows: int = 0
    num_stores: int = 0
    num_loads: int = 0
    fault: str = ""


def sums_of(rows: torch.Tensor) -> torch.Tensor:
    """Return a sum of each row's words, in which each has a weight of its own."""
    flat = rows.reshape(len(rows), -1).contiguous().view(torch.int64)
    return (flat * torch.arange(1, 2 * flat.shape[1], 2)).sum(1)


class Copier:
    """Copies between one rank's device pool and its host pool.

    Args:
        streams: What runs the copies.
        report: A file for the counts; None for none.
        spoiled: While this file exists, rows that are loaded hold another token's keys: those of
            all pools, or of the one that it names.
    """

    def __init__(self, streams: HostStreams, report: Path | None, spoiled: Path | None) -> None:
        self._streams = streams
        self._report = report
        self._spoiled = spoiled
        self._counts = Counts()
        self._telling = threading.Lock()  # stores and loads are carried out by threads of their own
        self._sums: dict[tuple[int, int, int, int], int] = {}  # pool, layer, key or value, host row

    def store(self, host: Any, device: Any, host_ids: Any, device_ids: Any, _backend: str) -> None:
        """Stand in for `backup_from_device_all_layer`."""
        targets, sources = host_ids.clone(), device_ids.clone()
        expected = [
            [sums_of(plane[sources]) for _, plane in planes_of(host, device, layer)]
            for layer in range(num_layers(host))
        ]

        def copy() -> None:
            for layer, sums in enumerate(expected):
                pairs = planes_of(host, device, layer)
                for kind, ((host_rows, device_rows), sum_rows) in enumerate(
                    zip(pairs, sums, strict=True)
                ):
                    host_rows[targets] = device_rows[sources]
                    if not torch.equal(sums_of(host_rows[targets]), sum_rows):
                        self._fail(f"rows {sources.tolist()[:8]} changed under a store")
                    keys = [(id(host), layer, kind, row) for row in targets.tolist()]
                    self._sums.update(zip(keys, sum_rows.tolist(), strict=True))
            self._counts.stored_rows += len(sources)
            self._counts.num_stores += 1
            self._tell()

        self._streams.copy_later(copy)

    def load(
        self, host: Any, device: Any, host_ids: Any, device_ids: Any, layer: int, *_: Any, **__: Any
    ) -> None:
        """Stand in for `load_to_device_per_layer`."""
        sources, targets = host_ids.clone(), device_ids.clone()

        def copy() -> None:
            for kind, (host_rows, device_rows) in enumerate(planes_of(host, device, layer)):
                rows = host_rows[sources]
                known = [self._sums.get((id(host), layer, kind, row)) for row in sources.tolist()]
                if any(
                    one is not None and one != found
                    for one, found in zip(known, sums_of(rows).tolist(), strict=True)
                ):
                    self._fail(f"rows {sources.tolist()[:8]} are not what was stored")
                if kind == 0 and self._is_spoiled(host):
                    # With all of a token's planes nobody would see it.
                    rows = rows.flip(0) if len(rows) > 1 else -rows
                device_rows[targets] = rows
            if layer == num_layers(host) - 1:
                self._counts.loaded_rows += len(sources)
                self._counts.num_loads += 1
                self._tell()

        self._streams.copy_later(copy)

    def forget(self, host: Any, host_ids: torch.Tensor) -> None:
        """Forget rows that something else writes: the storage."""
        gone = set(host_ids.tolist())
        for key in [key for key in self._sums if key[0] == id(host) and key[-1] in gone]:
            del self._sums[key]

    def _is_spoiled(self, host: Any) -> bool:
        if self._spoiled is None or not self._spoiled.exists():
            return False
        label = "mamba" if is_of_states(host) else getattr(host, "pool_label", "kv")
        return self._spoiled.read_text() in ("", label)

    def _fail(self, fault: str) -> None:
        self._counts.fault = self._counts.fault or fault
        self._tell()

    def _tell(self) -> None:
        if self._report is None:
            return
        unfinished = self._report.with_suffix(f".{os.getpid()}")  # each rank has its own
        with self._telling:
            unfinished.write_text(json.dumps(asdict(self._counts)))
            unfinished.replace(self._report)


def is_of_states(host: Any) -> bool:
    """Return whether a host pool has states, and no keys and values."""
    return hasattr(host, "conv_buffer")


def num_layers(host: Any) -> int:
    """Return how many layers a host pool has rows of."""
    return int(host.num_mamba_layers if is_of_states(host) else host.layer_num)


def planes_of(host: Any, device: Any, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the host's and the device's rows of a layer: keys and values, or parts of a state."""
    if is_of_states(host):  # whose layouts have the rows outside
        parts = [*zip(host.conv_buffer, host.buffer_info.conv, strict=True)]
        if host.temporal_state_elem_size:
            parts.append((host.temporal_buffer, host.buffer_info.temporal))
        return [(rows[:, layer, 0], states[layer]) for rows, states in parts]
    if host.layout == "page_head":
        assert host.page_size == 1  # else a token's heads are not beside each other in a page
        keys, values = (each[:, :, 0, layer] for each in (host.k_buffer, host.v_buffer))
        return [(keys, device.k_buffer[layer]), (values, device.v_buffer[layer])]
    return [
        (host.k_data_refs[layer], device.k_buffer[layer]),
        (host.v_data_refs[layer], device.v_buffer[layer]),
    ]


def allocate(dims: Any, dtype: torch.dtype, device: str, *_: Any, **__: Any) -> torch.Tensor:
    """Return host memory that nothing has pinned, and of which nothing is there before its use."""
    return torch.empty(dims, dtype=dtype, device=device)


def install() -> None:
    """Let SGLang in this process copy so."""
    import importlib

    from sglang.srt.mem_cache import memory_pool_host
    from sglang.srt.mem_cache.pool_host import base, common

    gate, report, spoiled = (
        Path(os.environ[name]) if name in os.environ else None for name in (GATE, REPORT, SPOILED)
    )
    low, high = map(float, os.environ.get(DELAY_MS, "0,0").split(","))
    seed = int(os.environ.get(SEED, "0"))
    streams = HostStreams((low, high), seed, Gate(gate))
    copier = Copier(streams, report, spoiled)
    for module in ("managers.cache_controller", "mem_cache.l2_transfer"):
        try:
            found = importlib.import_module(f"sglang.srt.{module}")
        except ModuleNotFoundError:  # of newer releases alone
            continue
        found.device_module = streams
    common.ALLOC_MEMORY_FUNCS.default_factory = lambda: allocate
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    pool = getattr(memory_pool_host, "MHATokenToKVPoolHost", None)
    if pool is None:
        pool = importlib.import_module("sglang.srt.mem_cache.pool_host.mha").MHATokenToKVPoolHost
    write, make_page = pool.set_from_flat_data_page, pool.get_dummy_flat_data_page

    def page_of(self: Any) -> Any:  # what is read from disk comes here first
        self.pin_memory = False
        return make_page(self)

    def set_page(self: Any, index: Any, data_page: Any) -> None:
        first = int(index)
        copier.forget(self, torch.arange(first, first + self.page_size))
        write(self, index, data_page)

    def store(self: Any, *args: Any, **kwargs: Any) -> None:
        copier.store(self, *args, **kwargs)

    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        copier.load(self, *args, **kwargs)

    pool.get_dummy_flat_data_page = page_of
    pool.set_from_flat_data_page = set_page
    classes = [pool]
    with suppress(ModuleNotFoundError):  # of newer releases alone
        states = importlib.import_module("sglang.srt.mem_cache.pool_host.mamba")
        classes.append(states.MambaPoolHost)
    for each in classes:
        each.backup_from_device_all_layer = store
        each.load_to_device_per_layer = load
    if os.environ.get(DEFECT) == UNMAPPED:
        from kvcached_sglang.engine import SglangEngine

        SglangEngine.map_for_copies = lambda _self: None  # type: ignore[method-assign]
