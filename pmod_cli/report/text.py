"""Numbers as the report writes them."""

from __future__ import annotations

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def signed(value: float) -> str:
    """A difference in points."""
    return f"{value:+.1f}".replace("-", "−")


def change(ratio: float) -> str:
    """What a ratio adds or takes away, in percent."""
    return f"{signed(100 * (ratio - 1))} %"


def share(value: float) -> str:
    """A share, in percent."""
    return f"{100 * value:.1f} %"


def flops(value: float) -> str:
    """FLOPs with four digits and a prefix."""
    unit, factor = next((pair for pair in _PREFIXES if value >= pair[1]), ("", 1.0))
    return f"{value / factor:#.4g} {unit}"


def milliseconds(value: float) -> str:
    """Seconds as milliseconds."""
    return f"{1e3 * value:.1f} ms"
