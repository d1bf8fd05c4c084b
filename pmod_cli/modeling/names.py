"""What parameters are called (no torch)."""

from __future__ import annotations


def is_router(parameter: str) -> bool:
    """Whether a parameter's full name is that of a router's weight or bias."""
    return ".router." in parameter
