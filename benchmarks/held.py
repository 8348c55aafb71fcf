"""What one server whose weights are gone still holds of its device, and its next request's wait.

    python benchmarks/held.py --json held.json --buffers yield

One 8B server with CUDA graphs. It is looked at awake and asleep; then it sleeps and answers by
turns, and each answer is compared with the first. With vLLM, at last a part of what comes back is
spoiled on purpose: the answer has to differ. `--tiny` rehearses it on a CPU.
"""

import json
import statistics
import time
from typing import Any

from parts.residue import context_bytes, parts, used_bytes, yielded
from parts.vllm_servers import READY_SECONDS
from parts.yielding import FIRST, Run, first_tokens_after_sleeps, make_parser, recorded_run

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM


def look(run: Run) -> dict[str, Any]:
    """Look what the server holds awake and asleep, and what that is."""
    context, awake = context_bytes(run), used_bytes(run) - run.used_before_bytes
    torchs = yielded(run, FIRST).get(FIRST, {})
    time.sleep(0.5)
    view, asleep = run.view(FIRST), used_bytes(run) - run.used_before_bytes
    return {
        "awake_bytes": awake,
        "asleep_bytes": asleep,
        "parts_bytes": parts(asleep, context, view.resident_bytes, torchs),
        "annex_bytes": torchs.get("annex_bytes", 0),
        "annex_kept_bytes": torchs.get("annex_kept_bytes", 0),
        "report": torchs,
    }


def wakes(run: Run, num: int) -> dict[str, Any]:
    """Ask a server that sleeps, again and again; and one that is awake."""
    found = first_tokens_after_sleeps(run, num, num_awake=10)
    seconds = found["seconds"]
    ordered = sorted(seconds)
    return {
        **found,
        "median_seconds": statistics.median(seconds),
        "p95_seconds": ordered[int(0.95 * (len(ordered) - 1))],
    }


def spoil(run: Run) -> dict[str, Any]:
    """Spoil what came back, and see that the answer differs; it counts as no wrong one."""
    run.ask(FIRST)
    run.call(FIRST, "spoil_annex")
    before = run.num_wrong
    run.ask(FIRST)
    is_different, run.num_wrong = run.num_wrong > before, before
    return {"is_different": is_different}


def stack(run: Run) -> dict[str, Any]:
    """Look what the stacks of kernels hold, and whether answers stay what they are without it."""
    if run.tiny:
        return {}
    path = run.folder / "stack.json"
    run.call(FIRST, "lower_stack", path)
    found: dict[str, Any] = json.loads(path.read_text())
    run.ask(FIRST)
    run.sleep(FIRST)
    time.sleep(0.5)
    return found | {"asleep_bytes": used_bytes(run) - run.used_before_bytes}


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    held = results.get("held", {})
    lines = [
        f"failed {results.get('failed')}, wrong tokens {results.get('wrong')}",
        f"ready after {results.get('ready_seconds', 0):.0f} s, buffers {results['buffers']}",
    ]
    whole = ("awake_bytes", "asleep_bytes", "annex_bytes", "annex_kept_bytes")
    sizes = {name: held.get(name, 0) for name in whole} | held.get("parts_bytes", {})
    lines += [f"{name:24} {size / MIB:10.1f} MiB" for name, size in sizes.items()]
    for size, number, *words in held.get("report", {}).get("largest", [])[:12]:
        lines.append(f"    {size / MIB:8.1f} {number:4} {' '.join(words)[:110]}")
    found = results.get("wakes", {})
    lines.append(
        f"first token after a sleep: median {found.get('median_seconds', 0):.4f} s, "
        f"p95 {found.get('p95_seconds', 0):.4f} s of {len(found.get('seconds', []))}"
    )
    lines += [f"{name}: {results.get(name)}" for name in ("spoiled", "stack", "errors")]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--buffers", choices=("keep", "yield"), default="yield")
    parser.add_argument("--number", type=int, default=30, help="how often it sleeps and wakes")
    options = parser.parse_args()
    is_vllm = options.engine == VLLM.name
    with recorded_run(options, buffers=options.buffers) as (run, record):
        if options.tiny:
            run.environ["LEAST_SCRATCH_BYTES"] = "32768"
        run.environ |= {"MEMORY_HISTORY": "1", "KVCACHED_BUFFERS": options.buffers}
        if not is_vllm:
            run.with_files(FIRST, 1)  # what this process takes for that is not the server's
        run.used_before_bytes = used_bytes(run)
        begin = time.monotonic()
        run.start(FIRST, 1)
        run.servers.wait_ready(seconds=READY_SECONDS)
        record.add(ready_seconds=time.monotonic() - begin)
        if is_vllm:
            run.call(FIRST, "end_history")
        run.ask(FIRST)
        record.add(copied_seconds=run.wait_copied(FIRST))
        record.add(held=look(run))
        record.add(wakes=wakes(run, options.number))
        if is_vllm:
            record.add(spoiled=spoil(run), stack=stack(run))
    print(table(record.results))


if __name__ == "__main__":
    main()
