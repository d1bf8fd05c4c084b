"""Numbers as people read them: decimal prefixes, shares, differences, times."""

from __future__ import annotations

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def prefix(value: float, smallest: str = "") -> tuple[str, float]:
    """The decimal prefix that leaves a number of 1 or more, and its factor; ``smallest`` or none fits."""
    for name, factor in _PREFIXES:
        if abs(value) >= factor or name == smallest:
            return name, factor
    return "", 1.0


def digits(value: float) -> str:
    """Four significant digits, trailing zeros kept: ``8.660``."""
    return f"{value:#.4g}".rstrip(".")


def si(value: float, unit: str = "") -> str:
    """Four digits with a decimal prefix: ``8.660 T``, ``8.660 TFLOPs``."""
    name, factor = prefix(value)
    return f"{digits(value / factor)} {name}{unit}".rstrip()


def size(count: float) -> str:
    """Bytes: ``1.234 GB``."""
    name, factor = prefix(count)
    return f"{count / factor:.3f} {name}B" if name else f"{count:.0f} B"


def share(value: float | None) -> str:
    """A share in percent, ``58.8 %``; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """A difference in points, ``+1.2`` or ``−0.3``."""
    return f"{value:+.1f}".replace("-", "−")


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds: ``12.3 ms``."""
    return f"{1e3 * seconds:.1f} ms"
