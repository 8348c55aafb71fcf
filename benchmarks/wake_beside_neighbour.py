"""Sleep and wake beside a neighbour that fills the device, with vLLM's real servers.

    python benchmarks/wake_beside_neighbour.py --json benchmarks/results/wake_beside_neighbour.json

A server sleeps, in turn at level 1 and 2; its neighbour's prefix cache fills the device; the
server is woken and answers as before. Then the neighbour's running requests hold more than the
room: a wake is refused, a request waits, a later wake is granted. Last a mixture of experts of
20 GiB starts beside the full cache. A ballast takes what would make the device too large to fill
in time. `--tiny` rehearses the logic on vLLM's CPU engine, where nothing really sleeps.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from parts.record import begin_record, command_line
from parts.sleepers import NEIGHBOUR, PROMPT, SLEEPER, WAKE_SECONDS, Run
from parts.yielding_servers import TESTS

from kvcached_core.units import GIB, format_bytes

sys.path.insert(0, str(TESTS))
from helpers.shapes import make_files, make_shape

EXPERTS = "experts"
MOE_BYTES = 20 * GIB
BUSY_SHARE = 0.9  # of the room, in the hands of running requests


def rounds(run: Run, num_rounds: int, end: float) -> None:
    """Sleep, fill, wake and answer, until there were so many rounds or the time is up."""
    right = run.answers(SLEEPER)
    done: list[dict[str, Any]] = []
    for number in range(num_rounds):
        if time.monotonic() > end:
            break
        level = 1 + number % 2
        run.fall_asleep(level)
        held = run.fill()
        device, asleep = run.view()
        status, text, seconds = run.wake(level)
        is_right = status == httpx.codes.OK and run.answers(SLEEPER) == right
        _, rows = run.view()
        done.append(
            {
                "level": level,
                "neighbour_bytes": held,
                "free_bytes_before": device.free_bytes,
                "given_bytes": held - rows[NEIGHBOUR].resident_bytes,
                "weights_bytes_asleep": asleep[SLEEPER].weights_bytes,
                "announced_bytes_after": rows[SLEEPER].static_bytes,
                "status": status,
                "text": text[:500],
                "wake_seconds": seconds,
                "tokens_right": is_right,
            }
        )
        run.record.add(rounds=done)
        if not is_right:
            break


def busy(run: Run, num_rounds: int, end: float) -> None:
    """Wake beside requests that hold more than the room: refused, and granted when they ended."""
    right = run.answers(SLEEPER)
    done: list[dict[str, Any]] = []
    for _ in range(num_rounds):
        if time.monotonic() > end:
            break
        run.fall_asleep(1)
        device, rows = run.view()
        room = device.free_bytes + rows[NEIGHBOUR].resident_bytes
        num_in, num_out = run.size.num_prompt_tokens, run.size.num_busy_tokens
        num = int(0.97 * room / run.size.kv_bytes_per_token / num_in)
        load = run.send_meanwhile(NEIGHBOUR, num, num_in, num_out, 7)
        while not load.done() and run.view()[1][NEIGHBOUR].used_bytes < BUSY_SHARE * room:
            time.sleep(0.1)
        status, text, seconds = run.wake(1)
        is_well = run.is_well() if status != httpx.codes.OK else False
        waiter = run.send_meanwhile(SLEEPER, *PROMPT, 0)
        time.sleep(2)
        waits = not waiter.done()
        finished = load.result()
        later, later_text, later_seconds = run.wake(1)
        try:
            waited = waiter.result(WAKE_SECONDS)[0].token_ids
        except TimeoutError:
            waited = []
        done.append(
            {
                "room_bytes": room,
                "requests": num,
                "refused_status": status,
                "refused_text": text[:500],
                "refused_seconds": seconds,
                "asleep_and_well": is_well,
                "request_waited": waits,
                "later_status": later,
                "later_text": later_text[:500],
                "later_seconds": later_seconds,
                "waiter_right": waited == right[0],
                "tokens_right": run.answers(SLEEPER) == right,
                "neighbour_failed": sum(one.error is not None for one in finished),
            }
        )
        run.record.add(busy=done)


def experts(run: Run) -> None:
    """Start a mixture of experts of 20 GiB beside a neighbour whose cache fills the device."""
    run.servers[SLEEPER].kill()
    folder = make_files(make_shape(run.folder / "moe", "moe-20g"), MOE_BYTES)
    run.load_ballast(MOE_BYTES + 10 * GIB)
    held = run.fill()
    device, _ = run.view()
    start = time.monotonic()
    server = run.start(EXPERTS, model=folder)
    error = ""
    try:
        server.wait_ready(240)
        run.call(EXPERTS, "fill_weights")
        answer = run.send(EXPERTS, *PROMPT, 0)[0]
        error = answer.error or ""
    except Exception as failed:  # noqa: BLE001  whatever it was belongs into the record
        error = str(failed)[-2000:]
    _, rows = run.view()
    text = server.log.read_text(errors="replace")
    run.record.add(
        experts={
            "free_bytes_before": device.free_bytes,
            "neighbour_bytes_before": held,
            "neighbour_bytes_after": rows[NEIGHBOUR].resident_bytes,
            "ready_seconds": time.monotonic() - start,
            "error": error,
            "out_of_memory": "out of memory" in text.lower(),
            "warnings": [line[-300:] for line in text.splitlines() if "the start of this" in line],
        }
    )


def table(results: dict[str, Any]) -> str:
    """Return what happened, a line each."""
    lines = []
    for level in (1, 2):
        found = [one for one in results.get("rounds", []) if one["level"] == level]
        if found:
            times = sorted(one["wake_seconds"] for one in found)
            free = format_bytes(max(one["free_bytes_before"] for one in found))
            given = format_bytes(min(one["given_bytes"] for one in found))
            num_woken = sum(one["status"] == httpx.codes.OK for one in found)
            lines.append(
                f"level {level}: {len(found)} rounds, {num_woken} woken, "
                f"{sum(one['tokens_right'] for one in found)} with the right tokens, wake median "
                f"{statistics.median(times):.2f} s, longest {times[-1]:.2f} s, "
                f"at most {free} free before, at least {given} given"
            )
    lines += [
        f"busy neighbour: {one['refused_status']} after {one['refused_seconds']:.1f} s, well "
        f"{one['asleep_and_well']}, request waited {one['request_waited']} and was right "
        f"{one['waiter_right']}; later {one['later_status']}, tokens right {one['tokens_right']}"
        for one in results.get("busy", [])
    ]
    if results.get("busy"):
        lines.append(f"  refusal: {results['busy'][0]['refused_text']}")
    if "experts" in results:
        one = results["experts"]
        sizes = ("free_bytes_before", "neighbour_bytes_before", "neighbour_bytes_after")
        free, before, after = (format_bytes(one[size]) for size in sizes)
        lines.append(
            f"20 GiB of experts: ready in {one['ready_seconds']:.0f} s, error {one['error']!r}, "
            f"out of memory {one['out_of_memory']}, {free} free before, neighbour {before} to "
            f"{after}"
        )
    lines.append(f"neighbour's requests that failed: {results.get('failed', '?')}")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for, and print a table."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--rounds", type=int, default=50)
    arguments.add_argument("--busy-rounds", type=int, default=2)
    arguments.add_argument("--seconds", type=float, default=180, help="no new round after so long")
    arguments.add_argument(
        "--room-gib", type=float, help="what the cache of the neighbour may take"
    )
    arguments.add_argument(
        "--yield", dest="is_yielding", action="store_true", help="weights yield, too"
    )
    arguments.add_argument("--only", nargs="*", choices=("rounds", "busy", "experts"))
    options = arguments.parse_args()
    wanted = options.only or (("rounds", "busy") if options.tiny else ("rounds", "busy", "experts"))
    record = begin_record(options)
    record.add(weights="yield" if options.is_yielding else "keep")
    room_bytes = int(options.room_gib * GIB) if options.room_gib else None
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        run = Run(
            Path(folder),
            record,
            tiny=options.tiny,
            room_bytes=room_bytes,
            is_yielding=options.is_yielding,
        )
        try:
            begin = time.monotonic()
            run.start(SLEEPER, *(() if options.tiny else ("--enable-sleep-mode",)))
            run.start(NEIGHBOUR, "--enable-prefix-caching")
            run.servers.wait_ready()
            if not options.tiny:
                for name in run.servers.by_name:
                    run.call(name, "fill_weights")
            run.wait_offered()
            run.load_ballast(run.size.room_bytes)
            record.add(ready_seconds=time.monotonic() - begin)
            if "rounds" in wanted:
                rounds(run, options.rounds, time.monotonic() + options.seconds)
            if "busy" in wanted:
                busy(run, options.busy_rounds, time.monotonic() + options.seconds)
            if "experts" in wanted:
                experts(run)
        finally:
            record.add(failed=run.num_failed)
            run.close()
    print(table(record.results))


if __name__ == "__main__":
    main()
