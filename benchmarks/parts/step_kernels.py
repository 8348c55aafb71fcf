"""The kernels of a run and the pauses between them, beside another run's."""

from collections.abc import Callable

NUM_KERNELS_SHOWN = 8
PAUSE_MS = 0.02


def profile(run: Callable[[], object]) -> dict[str, list[float]]:
    """Return the milliseconds and the calls of each kernel of a run on the device itself."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if ProfilerActivity.CUDA not in supported_activities():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
    times: dict[str, list[float]] = {}
    spans = []
    for event in found.profiler.kineto_results.events():
        if str(event.device_type()).endswith("CUDA") and event.duration_ns():
            name = str(event.name())[:100]
            sums = times.setdefault(name, [0.0, 0])
            sums[0] += event.duration_ns() / 1e6
            sums[1] += 1
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return times | idle_times(sorted(spans))


def idle_times(spans: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Return the milliseconds in which nothing ran and the pauses, by the length of the pause."""
    pauses: dict[str, list[float]] = {
        label: [0.0, 0] for label in ("(idle)", "(idle, pauses above 20 us)")
    }
    latest = spans[0][1] if spans else 0
    for start, end in spans:
        pause_ms = (start - latest) / 1e6
        for label, least_ms in zip(pauses, (0, PAUSE_MS), strict=True):
            if pause_ms > least_ms:
                pauses[label][0] += pause_ms
                pauses[label][1] += 1
        latest = max(latest, end)
    return pauses


def longer(
    of_vanilla: dict[str, list[float]], of_other: dict[str, list[float]]
) -> dict[str, float]:
    """Return by how many ms each kernel took longer than vanilla's would have in as many calls.

    Two runs differ in how many steps they make; what a call takes does not depend on that.
    """
    return {
        name: of_other[name][0] - ms * of_other[name][1] / num_calls
        for name, (ms, num_calls) in of_vanilla.items()
        if num_calls and name in of_other
    }


def print_kernels(
    of_vanilla: dict[str, list[float]], of_other: dict[str, list[float]], name: str
) -> None:
    """Print the kernels whose calls differ most."""
    more = longer(of_vanilla, of_other)
    print(f"  kernels of {name}: {sum(more.values()):+.2f} ms in as many calls as vanilla's")
    for key in sorted(more, key=lambda key: -abs(more[key]))[:NUM_KERNELS_SHOWN]:
        ms, num_calls = of_vanilla[key]
        print(f"    {more[key]:+8.2f} ms, {ms / num_calls * 1e3:8.2f} us a call  {key}", flush=True)
