"""Run real engines side by side on one device, in several modes, under one schedule.

    python -m benchmarks run multi_model_host
    python -m benchmarks run multi_model -- --workloads ramp:8 ramp:16 arena:4

A run adds to its folder: raw records, samples of memory, a summary, pictures, a report. Modes may
be run at different times; the report is made of all that are there.
"""

import argparse
import asyncio
import functools
import itertools
import json
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multi_model.alike import settings_of
from multi_model.bars import of_workload, read_bar
from multi_model.client import REQUEST_SECONDS, Record, replay, write_records
from multi_model.cross_check import cross_check
from multi_model.errors import ModeError
from multi_model.fleet import Fleet
from multi_model.gateway_fleet import GatewayFleet
from multi_model.gpu import Gpu
from multi_model.model_files import make_folder, shape_bytes
from multi_model.modes import (
    ALONE,
    GATEWAY,
    MODES,
    SWAP,
    Member,
    Site,
    again,
    describe,
    members,
)
from multi_model.options import lengths_of, parser, site_of
from multi_model.replays import QUIET_SECONDS, bar, kept_if_cut_off, play_alone
from multi_model.report import write_report
from multi_model.settings import (
    GPU_WORKLOADS,
    HOST,
    HOST_WORKLOADS,
    LENGTHS,
    Folder,
    make_workload,
    slug,
)
from multi_model.swapping import LIMIT, SwappingFleet
from multi_model.workloads import Workload
from parts.machine import describe_gpu, describe_machine
from parts.record import end_by_signals
from rich.progress import Progress

from kvcached_demo.harness.engines import SGLANG, VLLM
from kvcached_demo.harness.model import make_model


@dataclass
class Run:
    """What shall be run, where, and where the results go."""

    site: Site
    profile: str
    kinds: list[str]
    workloads: list[Workload]
    folder: Folder
    workspace: Path
    shapes: list[str]
    cross_check_rates: tuple[float, ...] = ()
    swap_limit: int = LIMIT
    num_alone: int | None = None
    drain_seconds: float = REQUEST_SECONDS

    @functools.cached_property
    def models(self) -> list[Path]:
        """The folders of the models, which are made on first use."""
        if self.site.is_host:
            return [
                make_model(self.workspace / f"model{number}", seed=number)
                for number in range(len(self.kinds))
            ]
        folders = [self.workspace / f"model{number}" for number in range(len(self.kinds))]
        return [
            make_folder(folder, shape) for folder, shape in zip(folders, self.shapes, strict=True)
        ]

    def members(self, mode: str) -> list[Member]:
        """Return how the servers of a mode are started."""
        shares = [0.0] * len(self.kinds)
        for workload in self.workloads:
            for model, share in enumerate(workload.shares()):
                shares[model] += share / len(self.workloads)
        weights = [] if self.site.is_host else [shape_bytes(shape) for shape in self.shapes]
        return members(mode, self.site, self.kinds, shares, self.workspace / mode, weights)

    def play(self, mode: str, progress: Progress, *, label: str = "") -> None:
        """Start a mode's servers and replay all workloads.

        Args:
            mode: The mode.
            progress: Where it is shown.
            label: What the folder calls it, if not by the mode's name.
        """
        label = label or mode
        if mode == ALONE:
            self._play_alone(label, progress)
            return
        with self._fleet(mode, self.members(mode)) as fleet:
            for workload in self.workloads:
                self._replay(label, fleet, workload, progress)

    def _play_alone(self, label: str, progress: Progress) -> None:
        """Replay each model's own schedule on a server of its kind that has the device."""
        records: dict[str, list[Record]] = {slug(workload): [] for workload in self.workloads}
        sorts = list(zip(self.kinds, self.shapes, strict=True))
        for kind, shape in dict.fromkeys(sorts):
            own = [model for model, other in enumerate(sorts) if other == (kind, shape)]
            first = own[0]
            models = self.models[first : first + 1]
            with self._fleet(ALONE, self.members(ALONE)[first : first + 1], models) as fleet:
                for workload in self.workloads:
                    records[slug(workload)] += play_alone(
                        fleet, workload, own, progress, self.num_alone
                    )
                if first == 0 and kind == VLLM.name and self.cross_check_rates:
                    lengths = LENGTHS[self.profile]
                    found = cross_check(fleet, models[0], lengths, self.cross_check_rates)
                    self.folder.add(cross_check=found)
        for workload in self.workloads:
            files = self.folder.of(label, workload)
            write_records(files.with_name(f"{files.name}.csv"), records[slug(workload)])
            facts = {"settings": self._settings()}
            files.with_name(f"{files.name}.json").write_text(json.dumps(facts) + "\n")

    def _settings(self) -> dict[str, Any]:
        machine = self.folder.facts().get("machine", {})
        return settings_of(self.site, self.drain_seconds, machine, self.shapes)

    def _fleet(self, mode: str, chosen: list[Member], models: list[Path] | None = None) -> Fleet:
        words = (mode, chosen, self.site, models or self.models, self.workspace / mode)
        if mode == SWAP:
            return SwappingFleet(*words, limit=self.swap_limit)
        return GatewayFleet(*words) if mode == GATEWAY else Fleet(*words)

    def _replay(self, label: str, fleet: Fleet, workload: Workload, progress: Progress) -> None:
        files = self.folder.of(label, workload)
        gpu = None if self.site.is_host else Gpu()
        joules = gpu.joules() if gpu else None
        gate = fleet.gate()
        idle_bytes = gpu.used_bytes() if gpu else None
        num_before, seconds_before = fleet.activations() or (None, None)
        fleet.share_out()
        before, loaded = fleet.num_preemptions(), fleet.loaded_bytes()
        ended = files.with_name(f"{files.name}-ended.csv")
        with (
            fleet.sampling() as samples,
            bar(progress, label, workload) as on_done,
            kept_if_cut_off(ended, on_done) as note,
        ):
            asked = replay(
                workload,
                fleet.targets,
                gate=gate,
                on_done=note,
                drain_seconds=self.drain_seconds,
            )
            records = asyncio.run(asked)
        write_records(files.with_name(f"{files.name}.csv"), records)
        samples.write(files.with_name(f"{files.name}-memory.csv"))
        spent = gpu.joules() if gpu else None
        num_activations, activation_seconds = fleet.activations() or (None, None)
        facts = {
            "settings": self._settings(),
            "joules": None if spent is None or joules is None else spent - joules,
            "num_turns": gate.num_turns if gate else None,
            "num_activations": since(num_before, num_activations),
            "activation_seconds": since(seconds_before, activation_seconds),
            "loaded_bytes": since(loaded, fleet.loaded_bytes()),
            "idle_device_bytes": idle_bytes,
            "after_device_bytes": gpu.used_bytes() if gpu else None,
            "num_preemptions": [
                since(was, now) for was, now in zip(before, fleet.num_preemptions(), strict=True)
            ],
        }
        files.with_name(f"{files.name}.json").write_text(json.dumps(facts) + "\n")
        time.sleep(QUIET_SECONDS)


def since(before: float | None, now: float | None) -> float | None:
    """Return how much a sum has grown, or None where nobody counts."""
    return None if before is None or now is None else now - before


def main(words: Sequence[str] | None = None) -> None:
    """Run, and write the report."""
    options = parser(__doc__ or "").parse_args(words)
    end_by_signals(signal.SIGTERM)
    folder = Folder(options.out)
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as workspace:
        try:
            runs = list(make_runs(options, folder, Path(workspace)))
        except ModeError as error:
            raise SystemExit(f"multi_model: {error}") from None
        if options.dry_run:
            for run in runs:
                rehearse(run, options.modes)
            return
        machine = describe_machine() if options.profile == HOST else describe_gpu()
        folder.add(
            machine=machine,
            model="tiny" if options.profile == HOST else ", ".join(options.shape),
            shared=describe(runs[0].site),
            pool_bytes=runs[0].site.pool_bytes,
            caching=options.caching,
            page_bytes=options.page_bytes or "default",
        )
        with Progress() as progress:
            for run, mode in itertools.product(runs, options.modes):
                run.play(mode, progress)
            for run, mode in itertools.product(runs, options.twice):
                run.play(mode, progress, label=again(mode))
    write_report(folder.path)


def rehearse(run: Run, modes: Sequence[str]) -> None:
    """Print what would be done."""
    print(f"on {describe(run.site)}, into {run.folder.path}")
    for workload in run.workloads:
        print(f"  {workload.name}: {len(workload.requests)} requests in {workload.seconds:.0f} s")
    for mode in modes:
        print(f"{mode}: {MODES[mode]}")
        for found in run.members(mode):
            words = " ".join(
                [f"{name}={value}" for name, value in found.environ.items()]
                + [found.engine.name, *found.options, *found.arguments]
            )
            print(f"  {found.name}: {words}")


def make_runs(options: argparse.Namespace, folder: Folder, workspace: Path) -> Iterator[Run]:
    """Yield a run for each number of models.

    Raises:
        ModeError: If a workload or a mode cannot be run here.
    """
    is_host = options.profile == HOST
    site = site_of(options)
    if len(set(options.shape)) > 1 and SGLANG.name in options.engines:
        raise ModeError("several shapes are vLLM's alone here: SGLang counts its cache in tokens")
    bars = [read_bar(words) for words in options.bars]
    for num_models in options.num_models or [2 if is_host else 3]:
        kinds, shapes = (
            list(itertools.islice(itertools.cycle(each), num_models))
            for each in (options.engines, options.shape)
        )
        names = options.workloads or (HOST_WORKLOADS if is_host else GPU_WORKLOADS)
        lengths = lengths_of(options)
        workloads = [make_workload(name, num_models, lengths, options.seconds) for name in names]
        run = Run(
            site,
            options.profile,
            kinds,
            workloads,
            folder,
            workspace / f"{num_models}-models",
            shapes,
            tuple(options.cross_check),
            options.swap_limit,
            options.alone_models,
            options.drain_seconds,
        )
        for mode in dict.fromkeys([*options.modes, *options.twice]):
            run.members(mode)
        for words, workload in zip(names, workloads, strict=True):
            fact = {
                "name": workload.name,
                "num_requests": len(workload.requests),
                "num_models": num_models,
                "bars": of_workload(bars, words),
            }
            if not is_host:
                fact["weights_bytes"] = [shape_bytes(shape) for shape in shapes]
                fact["card_bytes"] = site.cap_bytes
            if not options.dry_run:
                folder.add(**{slug(workload): fact})
        yield run


if __name__ == "__main__":
    main()
