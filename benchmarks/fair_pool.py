"""Two equal servers under equal load on a pool that is too small for both: do both get on?

    python benchmarks/fair_pool.py --engine sglang --json benchmarks/results/fair_pool_sglang.json

Each of two real servers on host memory (tiny model, no prefix cache) has clients that send one
request after the other for a minute. All of them together want more than the pool has. Counted is
what each server completed, and for how much of the time less than a page was free.
"""

import asyncio
import tempfile
import time
from pathlib import Path

from parts.machine import describe_machine
from parts.record import command_line, shown, write

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import ENGINES
from kvcached_demo.harness.load import make_burst
from kvcached_demo.harness.memory import Recorder
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

NAMES = ("left", "right")
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 1000, 24
PAGE_BYTES = 16 * MIB
LEAST_SHARE = 0.8


async def load(server: EngineServer, client: int, end: float) -> list[str | None]:
    """Send one request after the other until the time is up; return each one's error or None."""
    errors: list[str | None] = []
    seed = 1000 * client
    while time.monotonic() < end:
        seed += 1
        burst = make_burst(
            num_requests=1,
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            num_output_tokens=NUM_OUTPUT_TOKENS,
            seed=seed,
        )
        (answer,) = await server.send(burst)
        if time.monotonic() < end:
            errors.append(answer.error)
    return errors


async def load_both(
    servers: list[EngineServer], num_clients: int, seconds: float
) -> list[list[str | None]]:
    """Load both servers alike; return what became of the requests of each."""
    end = time.monotonic() + seconds
    both = [
        asyncio.gather(
            *(load(server, number * num_clients + client, end) for client in range(num_clients))
        )
        for number, server in enumerate(servers)
    ]
    return [[error for of_client in await one for error in of_client] for one in both]


def main() -> None:
    """Run, print, write JSON; fail if a request failed or one server got on much worse."""
    arguments = command_line(__doc__)
    arguments.add_argument("--engine", choices=ENGINES, default="sglang")
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--clients", type=int, default=8, help="of each server")
    arguments.add_argument("--pool-mib", type=int, default=256)
    options = arguments.parse_args()
    pool_bytes = options.pool_mib * MIB
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        model = make_model(Path(folder) / "model", seed=1)
        engine = ENGINES[options.engine]
        with Servers(Path(folder), pool_bytes) as servers:
            both = [
                servers.start(
                    engine,
                    name,
                    model,
                    *engine.caching(is_on=False),
                    *engine.running(32),
                    *engine.size(pool_bytes, KV_BYTES_PER_TOKEN, is_elastic=True, is_host=True),
                    environ=engine.host_environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
                )
                for name in NAMES
            ]
            servers.wait_ready()
            asyncio.run(load_both(both, 1, 3.0))  # the first requests compile and map
            with Recorder(servers.open_ledger) as recorder:
                ended = asyncio.run(load_both(both, options.clients, options.seconds))
    views = recorder.recording.views
    completed = [sum(error is None for error in errors) for errors in ended]
    results = {
        "machine": describe_machine(),
        "engine": options.engine,
        "seconds": options.seconds,
        "clients_of_each": options.clients,
        "pool_bytes": pool_bytes,
        "completed": dict(zip(NAMES, completed, strict=True)),
        "fewer_by_more": min(completed) / max(*completed, 1),
        "failed": sum(error is not None for errors in ended for error in errors),
        "share_of_time_below_a_page_free": sum(view.free_bytes < PAGE_BYTES for view in views)
        / len(views),
    }
    write(options.json, results)
    print(shown(results))
    if results["failed"] or results["fewer_by_more"] < LEAST_SHARE:
        raise SystemExit(f"requests failed, or one server completed less than {LEAST_SHARE:.0%}")


if __name__ == "__main__":
    main()
