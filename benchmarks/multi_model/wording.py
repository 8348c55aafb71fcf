"""Numbers as a report writes them: 1,180 ms and not 1.18e+03."""

from typing import Any

# From which size on a number has so many digits behind the point.
DIGITS = ((100.0, 0), (10.0, 1), (1.0, 2))


def number(value: float | None, unit: str = "", scale: float = 1.0) -> str:
    """Return a number with its unit: three digits at least, thousands apart, no exponent.

    A count has no digits behind a point.

    Args:
        value: The number; None gives nothing.
        unit: What stands behind it.
        scale: What the number is divided by before.
    """
    if value is None:
        return ""
    scaled = value / scale
    digits = next((digits for size, digits in DIGITS if abs(scaled) >= size), 3 * bool(scaled))
    digits = 0 if isinstance(value, int) and scale == 1.0 else digits
    return f"{scaled:,.{digits}f}{' ' + unit if unit else ''}"


def ratio(found: dict[str, Any]) -> str:
    """Return a ratio with its interval."""
    low, high = (number(found[name]) for name in ("low", "high"))
    return f"{number(found['value'])} ({low} to {high})"
