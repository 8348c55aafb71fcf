"""A restart with its weights from the host copy, beside one from a page-cached checkpoint.

    python benchmarks/restart.py --json benchmarks/results/gpu/restart_vllm_h200.json
    python benchmarks/restart.py --engine sglang --json benchmarks/results/gpu/restart_sglang.json

One server is started again and again, in turn with `KVCACHED_WEIGHTS_RESTART` off and on. Its
files lie in memory, so no disk is waited for. The clock runs from the command to the first answer
on its health check; the tokens of one request have to be the same each time. `--tiny` rehearses it
on the engine's CPU backend, where a start is imports and the weights are nothing.
"""

import shlex
import statistics
import time
from typing import Any

from parts.record import begin_record, command_line
from parts.vllm_servers import READY_SECONDS
from parts.yielding import FIRST, Run, running

from kvcached_demo.harness.engines import SGLANG, VLLM

FILES, COPY = "files", "copy"
RESTART = "KVCACHED_WEIGHTS_RESTART"
NO_FILE = "no file was read"
BAR = 0.6


def start(run: Run, kind: str, arguments: tuple[str, ...], *, is_first: bool = False) -> float:
    """Start the server once more; return after how many seconds it was ready.

    The first start has no copy. It notes what it has loaded, which only one does that may restart.
    """
    begin = time.monotonic()
    run.start(FIRST, 1, *arguments, **{RESTART: str(int(kind == COPY))})
    run.servers.wait_ready(FIRST, seconds=READY_SECONDS)
    seconds = time.monotonic() - begin
    log = run.servers[FIRST].log.read_text(errors="replace")
    said = NO_FILE in log
    if said != (kind == COPY and not is_first):
        ours = "\n".join(line for line in log.splitlines() if "kvcached: " in line)
        raise RuntimeError(
            f"a start from {kind} {'read no' if said else 'read its'} files:\n{ours}"
        )
    return seconds


def end(run: Run) -> None:
    """Have the server's copy complete, see that it answers the same, and end it."""
    run.ask(FIRST)
    run.wait_copied(FIRST)
    run.servers.stop()


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    ratios = results["ratios"]
    return (
        f"ready after {statistics.median(results[FILES]):.2f} s from files, "
        f"{statistics.median(results[COPY]):.2f} s from the copy: ratio "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), the bar is "
        f"{BAR}; wrong tokens {results['wrong']}, failed {results['failed']}"
    )


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--engine", choices=(VLLM.name, SGLANG.name), default=VLLM.name)
    arguments.add_argument("--shape", default="llama-8b")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--eager", action="store_true", help="vLLM: no compilation")
    arguments.add_argument("--server-options", default="", help="more arguments of every start")
    options = arguments.parse_args()
    more = shlex.split(options.server_options)
    words = (*(("--enforce-eager",) if options.eager else ()), *more)
    engine = {each.name: each for each in (VLLM, SGLANG)}[options.engine]
    record = begin_record(options)
    record.add(bar=BAR, engine=f"{engine.title} {engine.release()}", server_options=more)
    times: dict[str, list[float]] = {FILES: [], COPY: []}
    made = {"engine": engine, "shape": options.shape, "has_files": True}
    with running(Run, record, tiny=options.tiny, runner=None, **made) as run:
        record.add(first_seconds=start(run, COPY, words, is_first=True))
        end(run)
        for _ in range(options.rounds):
            for kind, found in times.items():
                found.append(start(run, kind, words))
                record.add(**times)
                end(run)
            ratios = [copy / files for files, copy in zip(*times.values(), strict=True)]
            record.add(ratios=ratios)
    print(table(record.results))


if __name__ == "__main__":
    main()
