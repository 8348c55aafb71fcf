"""SGLang's servers with us against without, on a GPU: throughput, latency, resident memory.

    python benchmarks/sglang_overhead.py --json benchmarks/results/sglang_overhead.json

One vanilla and one elastic server of the same capacity run side by side and get the same requests
in turn, from SGLang's own `bench_serving`. Each figure is a ratio to the vanilla run of the same
round, the median of all rounds. A second vanilla server, the control, shows the noise. `--starts`
is as in `vllm_overhead.py`.
"""

import tempfile
from pathlib import Path
from typing import Any

from parts.record import Record, begin_record, command_line
from parts.sglang_servers import SGLangSetting
from parts.vllm_servers import served
from vllm_overhead import CONTROL, ELASTIC, VANILLA, play_start

from kvcached_core.units import GIB
from kvcached_demo.harness.engines import SGLANG

WORKLOADS = {
    "1024/128 at saturation": (1024, 128, "inf", 400),
    "1024/128 at 8 req/s": (1024, 128, "8", 120),
}
TINY_WORKLOADS = {"saturation": (100, 16, "inf", 12), "8 req/s": (100, 16, "8", 12)}


def serve(setting: SGLangSetting, record: Record, names: list[str], options: Any) -> None:
    """Compare the servers in `names`."""

    def start(name: str) -> None:
        kv_bytes = None if setting.tiny else options.kv_gib * GIB
        uncached = SGLANG.caching(is_on=False)
        setting.start(name, *uncached, elastic=name == ELASTIC, kv_bytes=kv_bytes)

    workloads = TINY_WORKLOADS if setting.tiny else WORKLOADS
    for number in range(options.starts):
        play_start(
            setting, record, names, start, workloads, number=number, num_rounds=options.rounds
        )


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--rounds", type=int, default=3, help="of each start")
    arguments.add_argument("--starts", type=int, default=1, help="how often all servers start")
    arguments.add_argument(
        "--kv-gib", type=int, default=24, help="KV capacity of each server, in GiB"
    )
    arguments.add_argument("--control", action="store_true", help="with a second vanilla server")
    options = arguments.parse_args()
    names = [VANILLA, ELASTIC] + ([CONTROL] if options.control else [])
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        record = begin_record(options)
        setting = SGLangSetting(Path(folder), tiny=options.tiny)
        with served(setting.servers, options.json):
            serve(setting, record, names, options)


if __name__ == "__main__":
    main()
