"""Run real engines side by side on one device, in several modes, under one schedule.

    python -m benchmarks run multi_model_host
    python -m benchmarks run multi_model -- --workloads ramp:8 ramp:16 arena:4

A run adds to its folder: raw records, samples of memory, a summary, pictures, a report. Modes may
be run at different times; the report is made of all that are there.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from machine import describe_gpu, describe_machine
from multi_model import workloads as schedules
from multi_model.client import Record, TakingTurns, replay, write_records
from multi_model.fleet import Fleet
from multi_model.gpu import Gpu
from multi_model.metrics import spread, tpots, ttfts
from multi_model.modes import (
    ALONE,
    ELASTIC,
    MODES,
    SLEEP_SWAP,
    STATIC,
    Member,
    ModeError,
    Site,
    describe,
    members,
)
from multi_model.report import write_report
from multi_model.settings import (
    GPU,
    GPU_WORKLOADS,
    HOST,
    HOST_POOL_BYTES,
    HOST_WORKLOADS,
    LENGTHS,
    SHAPES,
    Folder,
    make_workload,
    slug,
)
from multi_model.workloads import Workload
from rich.progress import Progress
from tokenizers import Tokenizer
from vllm_servers import bench_serve, kv_bytes_per_token, make_shape

from kvcached_core.units import GIB
from kvcached_demo.harness.engines import ENGINES, VLLM
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import EngineServer

QUIET_SECONDS = 2.0
CROSS_CHECK_ROUNDS = 2


@dataclass
class Run:
    """What shall be run, where, and where the results go."""

    site: Site
    profile: str
    kinds: list[str]
    workloads: list[Workload]
    folder: Folder
    workspace: Path
    shape: str
    cross_check_rates: tuple[float, ...] = ()

    @functools.cached_property
    def models(self) -> list[Path]:
        """The folders of the models, which are made on first use."""
        if self.site.is_host:
            return [
                make_model(self.workspace / f"model{number}", seed=number)
                for number in range(len(self.kinds))
            ]
        return [make_shape(self.workspace / "model", self.shape)] * len(self.kinds)

    def members(self, mode: str) -> list[Member]:
        """Return how the servers of a mode are started."""
        shares = [0.0] * len(self.kinds)
        for workload in self.workloads:
            for model, share in enumerate(workload.shares()):
                shares[model] += share / len(self.workloads)
        return members(mode, self.site, self.kinds, shares, self.workspace / mode)

    def play(self, mode: str, progress: Progress) -> None:
        """Start a mode's servers and replay all workloads."""
        if mode == ALONE:
            self._play_alone(progress)
            return
        with self._fleet(mode, self.members(mode)) as fleet:
            for workload in self.workloads:
                self._replay(mode, fleet, workload, progress)

    def cross_check(self, fleet: Fleet, rates: Sequence[float]) -> None:
        """Compare our client with vLLM's on one model: text prompts, sent at even distances."""
        lengths, model = LENGTHS[self.profile], self.models[0]
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        found = []
        for rate in rates:
            steady = schedules.constant(
                rate,
                lengths.cross_check_seconds,
                num_models=1,
                num_in=lengths.num_in,
                num_out=lengths.num_out,
            )

            def ours(seed: int, steady: Workload = steady) -> list[Record]:
                return asyncio.run(
                    replay(steady, fleet.targets, seed=seed, encode=tokenizer.decode)
                )

            ours(CROSS_CHECK_ROUNDS)  # the first requests are slow
            num = len(steady.requests)
            pairs = [
                (ours(seed), self._bench(fleet.servers[0], model, rate, num, seed))
                for seed in range(CROSS_CHECK_ROUNDS)
            ]
            found.append(means(rate, pairs))
        self.folder.add(cross_check=found)

    def _bench(
        self, server: EngineServer, model: Path, rate: float, num: int, seed: int
    ) -> dict[str, Any]:
        lengths = LENGTHS[self.profile]
        return bench_serve(
            server, model, lengths.num_in, lengths.num_out, str(rate), num, seed, is_even=True
        )

    def _play_alone(self, progress: Progress) -> None:
        """Replay each model's own schedule on a server of its kind that has the device."""
        records: dict[str, list[Record]] = {slug(workload): [] for workload in self.workloads}
        for kind in dict.fromkeys(self.kinds):
            first = self.kinds.index(kind)
            own = [model for model, other in enumerate(self.kinds) if other == kind]
            with self._fleet(ALONE, self.members(ALONE)[first : first + 1]) as fleet:
                for workload in self.workloads:
                    records[slug(workload)] += play_alone(fleet, workload, own, progress)
                if kind == VLLM.name and self.cross_check_rates:
                    self.cross_check(fleet, self.cross_check_rates)
        for workload in self.workloads:
            found = records[slug(workload)]
            write_records(Path(f"{self.folder.of(ALONE, workload)}.csv"), found)

    def _fleet(self, mode: str, chosen: list[Member]) -> Fleet:
        return Fleet(mode, chosen, self.site, self.models, self.workspace / mode)

    def _replay(self, mode: str, fleet: Fleet, workload: Workload, progress: Progress) -> None:
        files = self.folder.of(mode, workload)
        gpu = None if self.site.is_host else Gpu()
        joules = gpu.joules() if gpu else None
        gate = turns(fleet) if mode == SLEEP_SWAP else None
        fleet.share_out()
        before = fleet.num_preemptions()
        with fleet.sampling() as samples, bar(progress, mode, workload) as on_done:
            records = asyncio.run(replay(workload, fleet.targets, gate=gate, on_done=on_done))
        write_records(files.with_name(f"{files.name}.csv"), records)
        samples.write(files.with_name(f"{files.name}-memory.csv"))
        spent = gpu.joules() if gpu else None
        facts = {
            "joules": None if spent is None or joules is None else spent - joules,
            "num_turns": gate.num_turns if gate else None,
            "num_preemptions": [
                None if was is None or now is None else now - was
                for was, now in zip(before, fleet.num_preemptions(), strict=True)
            ],
        }
        files.with_name(f"{files.name}.json").write_text(json.dumps(facts) + "\n")
        time.sleep(QUIET_SECONDS)


@contextlib.contextmanager
def bar(progress: Progress, mode: str, workload: Workload) -> Iterator[Callable[[Record], None]]:
    """Show a replay; what is yielded is told of each request that ended."""
    task = progress.add_task(f"{mode}: {workload.name}", total=len(workload.requests))
    yield lambda _record: progress.advance(task)
    progress.stop_task(task)


def play_alone(
    fleet: Fleet, workload: Workload, models: Sequence[int], progress: Progress
) -> list[Record]:
    """Replay the schedule of each of these models on the fleet's one server, one after the other.

    Models of one kind have one shape, so one server stands for all; schedules that are the same but
    for their beginning are replayed once.
    """
    records: list[Record] = []
    known: dict[tuple[Any, ...], list[Record]] = {}
    for model in models:
        own = workload.of_model(model)
        begin = own.requests[0].at_seconds if own.requests else 0.0
        moved = tuple(
            replace(request, at_seconds=round(request.at_seconds - begin, 6), model=0)
            for request in own.requests
        )
        if moved and moved not in known:
            with bar(progress, ALONE, own) as on_done:
                known[moved] = asyncio.run(
                    replay(replace(own, requests=moved), fleet.targets[:1], on_done=on_done)
                )
            time.sleep(QUIET_SECONDS)
        records += [replace(record, model=model) for record in known.get(moved, [])]
    return records


def turns(fleet: Fleet) -> TakingTurns:
    """Return the gate at which a fleet's models take turns to be awake; all but the first sleep."""

    async def fall_asleep(model: int) -> None:
        await asyncio.to_thread(fleet.sleep, model)

    async def wake_up(model: int) -> None:
        await asyncio.to_thread(fleet.wake_up, model)

    return TakingTurns(fall_asleep, wake_up)


def means(rate: float, pairs: Sequence[tuple[list[Record], dict[str, Any]]]) -> dict[str, Any]:
    """Return what our client and vLLM's found at one rate, in ms."""
    ours = [record for records, _ in pairs for record in records]
    return {
        "rate": rate,
        "ours": {
            "mean_ttft_ms": spread(ttfts(ours))["mean"],
            "mean_tpot_ms": spread(tpots(ours))["mean"],
        },
        "vllm_bench_serve": {
            name: statistics.mean(theirs[name] for _, theirs in pairs)
            for name in ("mean_ttft_ms", "mean_tpot_ms")
        },
    }


def site_of(options: argparse.Namespace) -> Site:
    """Return where a run takes place."""
    pool_bytes = int(options.pool_gib * GIB) if options.pool_gib else None
    more = tuple(options.server_options.split())
    if options.profile == HOST:
        return Site(
            is_host=True,
            kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            pool_bytes=pool_bytes or HOST_POOL_BYTES,
            caching=options.caching,
            options=more,
            page_bytes=options.page_bytes,
        )
    device_bytes = Gpu().total_bytes
    cap_bytes = int(options.cap_gib * GIB) if options.cap_gib else device_bytes
    return Site(
        is_host=False,
        kv_bytes_per_token=kv_bytes_per_token(options.shape),
        pool_bytes=pool_bytes,
        device_bytes=device_bytes,
        cap_bytes=min(cap_bytes, device_bytes),
        caching=options.caching,
        options=more,
        page_bytes=options.page_bytes,
    )


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


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="multi_model", description=__doc__)
    made.add_argument("--profile", choices=(HOST, GPU), default=HOST)
    made.add_argument("--out", type=Path, required=True, help="the run's folder")
    made.add_argument("--modes", nargs="+", choices=MODES, default=[ALONE, STATIC, ELASTIC])
    made.add_argument("--workloads", nargs="+", metavar="NAME:NUMBER")
    made.add_argument("--num-models", nargs="+", type=int, help="one run with each; 3 on a GPU")
    made.add_argument("--engines", nargs="+", choices=ENGINES, default=[VLLM.name])
    made.add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="of the GPU's models")
    memory = made.add_mutually_exclusive_group()
    memory.add_argument("--pool-gib", type=float, help="what all KV caches may hold together")
    memory.add_argument("--cap-gib", type=float, help="how much of the GPU this run may use")
    made.add_argument("--page-bytes", default="", help="of elastic engines, such as 2MiB")
    made.add_argument("--caching", action="store_true", help="prefix caching on")
    made.add_argument("--seconds", type=float, help="of constant, arena and azure")
    made.add_argument("--num-out", type=int, help="tokens of each answer, but for arena and azure")
    made.add_argument(
        "--cross-check",
        nargs="+",
        type=float,
        default=[],
        metavar="RATE",
        help="compare the client with vLLM's own, in mode alone",
    )
    made.add_argument("--server-options", default="", help="more arguments of every server")
    made.add_argument("--dry-run", action="store_true", help="print what would be done")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Run, and write the report."""
    options = parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
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
            model="tiny" if options.profile == HOST else options.shape,
            shared=describe(runs[0].site),
            pool_bytes=runs[0].site.pool_bytes,
            caching=options.caching,
            page_bytes=options.page_bytes or "default",
        )
        with Progress() as progress:
            for run, mode in itertools.product(runs, options.modes):
                run.play(mode, progress)
    write_report(folder.path)


def make_runs(options: argparse.Namespace, folder: Folder, workspace: Path) -> Iterator[Run]:
    """Yield a run for each number of models.

    Raises:
        ModeError: If a workload or a mode cannot be run here.
    """
    is_host = options.profile == HOST
    site = site_of(options)
    for num_models in options.num_models or [2 if is_host else 3]:
        kinds = list(itertools.islice(itertools.cycle(options.engines), num_models))
        names = options.workloads or (HOST_WORKLOADS if is_host else GPU_WORKLOADS)
        lengths = LENGTHS[options.profile]
        if options.num_out:
            lengths = replace(lengths, num_out=options.num_out, num_out_together=options.num_out)
        workloads = [make_workload(name, num_models, lengths, options.seconds) for name in names]
        run = Run(
            site,
            options.profile,
            kinds,
            workloads,
            folder,
            workspace / f"{num_models}-models",
            options.shape,
            tuple(options.cross_check),
        )
        for mode in options.modes:
            run.members(mode)
        for workload in workloads:
            folder_of = {"num_requests": len(workload.requests), "num_models": num_models}
            if not options.dry_run:
                folder.add(**{slug(workload): folder_of | {"name": workload.name}})
        yield run


if __name__ == "__main__":
    main()
