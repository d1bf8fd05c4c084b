"""The versions that a result came about with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """The version of a package, by its metadata; None if it has none.

    Args:
        package: Its name as pip has it, e.g. ``"lmms-eval"``.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str]:
    """Versions by name: Python, and those packages that are installed."""
    found = {package: version_of(package) for package in packages}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}
