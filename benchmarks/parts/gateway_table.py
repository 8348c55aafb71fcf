"""What `gateway_gpu` found, as text."""

from typing import Any

from parts.ordered import value_at


def table(results: dict[str, Any]) -> str:
    """Return the figures as text, with the bars."""
    start = results.get("start", {})
    lines = [f"up {results.get('models')} in {start.get('seconds', 0):.0f} s: {start}"]
    lines.append(f"failed {results.get('failed')} {results.get('errors', '')}")
    lines.append(f"different answers {results.get('different_answers')} of {results.get('of')}")
    if found := results.get("bursts"):
        times = found["ttft_seconds"] or [float("nan")]
        p99 = value_at(99, times)
        lines.append(
            f"bursts: {found['requests']}, TTFT p50 {times[len(times) // 2]:.3f}, p99 {p99:.3f} "
            f"(bar 1), max {times[-1]:.3f} s; "
            + ", ".join(f"{key} {found[key]}" for key in found if key != "ttft_seconds")
        )
    if found := results.get("classes"):
        lines.append(
            f"classes: {found['tokens_per_second']:.0f} tokens/s, {found['goals_seconds']}"
        )
        for way in ("without", "with"):
            for kind, each in found.get(way, {}).items():
                times = sorted(one for one in each["ttft_seconds"] if one is not None)
                lines.append(
                    f"  {way:8} {kind:7} n {each['requests']} failed {each['failed']} attained "
                    f"{each['attained']:.3f}, TTFT p50 {times[len(times) // 2]:.3f}, "
                    f"max {times[-1]:.3f} s"
                )
    if found := results.get("move"):
        lines.append(f"move: { {key: found[key] for key in found if key != 'ttft_seconds'} }")
    return "\n".join(lines)
