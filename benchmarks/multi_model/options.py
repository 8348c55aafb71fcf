"""The command line of the benchmark: what is run, where, and what was aimed at before."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from multi_model.client import REQUEST_SECONDS
from multi_model.gpu import Gpu
from multi_model.model_files import shape_bytes
from multi_model.modes import ALONE, ELASTIC, MODES, SLEEPING_BYTES, STATIC, Site
from multi_model.settings import GPU, HOST, HOST_POOL_BYTES, LENGTHS, SHAPES, Lengths
from multi_model.swapping import LIMIT
from parts.vllm_servers import kv_bytes_per_token

from kvcached_core.units import GIB
from kvcached_demo.harness.engines import ENGINES, VLLM
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN


def parser(description: str) -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="multi_model", description=description)
    made.add_argument("--profile", choices=(HOST, GPU), default=HOST)
    made.add_argument("--out", type=Path, required=True, help="the run's folder")
    made.add_argument("--modes", nargs="*", choices=MODES, default=[ALONE, STATIC, ELASTIC])
    made.add_argument(
        "--twice",
        nargs="+",
        choices=MODES,
        default=[],
        help="modes that are run once more at the end: the control, which says what noise is",
    )
    made.add_argument("--workloads", nargs="+", metavar="NAME:NUMBER")
    made.add_argument("--num-models", nargs="+", type=int, help="one run with each; 3 on a GPU")
    made.add_argument("--engines", nargs="+", choices=ENGINES, default=[VLLM.name])
    made.add_argument(
        "--shape",
        nargs="+",
        choices=SHAPES,
        default=SHAPES[:1],
        help="of the GPU's models; several take turns through them",
    )
    memory = made.add_mutually_exclusive_group()
    memory.add_argument("--pool-gib", type=float, help="what all KV caches may hold together")
    memory.add_argument("--cap-gib", type=float, help="how much of the GPU this run may use")
    made.add_argument("--page-bytes", default="", help="of elastic engines, such as 2MiB")
    made.add_argument("--caching", action="store_true", help="prefix caching on")
    made.add_argument("--tier-gib", type=float, default=8.0, help="each engine's, mode offload")
    made.add_argument("--seconds", type=float, help="of workloads that may last as long as wanted")
    made.add_argument("--num-out", type=int, help="tokens of each answer, but for traces' own")
    made.add_argument(
        "--bars",
        nargs="+",
        default=[],
        metavar="WORKLOAD/FIGURE[/MODE]<=NUMBER",
        help="what our ratio to a mode has to be, or without /MODE our figure itself, in ms or %%;"
        " the folder keeps it from before the run",
    )
    made.add_argument(
        "--cross-check",
        nargs="+",
        type=float,
        default=[],
        metavar="RATE",
        help="compare the client with vLLM's own, in mode alone",
    )
    made.add_argument(
        "--alone-models",
        type=_above_0,
        help="of each shape, so many models' schedules are replayed in mode alone, and stand for"
        " the others'; all of them if it is not said",
    )
    made.add_argument(
        "--drain-seconds",
        type=float,
        default=REQUEST_SECONDS,
        help="how long after the last request what has not ended may go on; then it has failed",
    )
    made.add_argument(
        "--num-awake",
        type=_above_0,
        default=1,
        help="models that are awake at a time in mode sleep-swap",
    )
    made.add_argument(
        "--sleeping-gib",
        type=float,
        default=SLEEPING_BYTES / GIB,
        help="room that mode sleep-swap leaves for what an engine holds that sleeps",
    )
    made.add_argument(
        "--swap-limit",
        type=int,
        default=LIMIT,
        help="requests that a model takes at a time in mode swap; those beyond fail",
    )
    made.add_argument(
        "--upstream-python",
        default=os.environ.get("UPSTREAM_PYTHON", ""),
        help="the interpreter that has the other kvcached, for mode upstream",
    )
    made.add_argument("--server-options", default="", help="more arguments of every server")
    made.add_argument("--dry-run", action="store_true", help="print what would be done")
    return made


def _above_0(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


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
            tier_bytes=int(options.tier_gib * GIB),
            num_awake=options.num_awake,
        )
    device_bytes = Gpu().total_bytes
    cap_bytes = int(options.cap_gib * GIB) if options.cap_gib else device_bytes
    return Site(
        is_host=False,
        kv_bytes_per_token=kv_bytes_per_token(options.shape[0]),
        pool_bytes=pool_bytes,
        device_bytes=device_bytes,
        cap_bytes=min(cap_bytes, device_bytes),
        caching=options.caching,
        options=more,
        page_bytes=options.page_bytes,
        upstream_python=options.upstream_python,
        tier_bytes=int(options.tier_gib * GIB),
        weights_bytes=max(map(shape_bytes, options.shape)),
        num_awake=options.num_awake,
        sleeping_bytes=int(options.sleeping_gib * GIB),
    )


def lengths_of(options: argparse.Namespace) -> Lengths:
    """Return how long requests are."""
    lengths = LENGTHS[options.profile]
    if options.num_out:
        return replace(lengths, num_out=options.num_out, num_out_together=options.num_out)
    return lengths
