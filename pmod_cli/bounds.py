"""The versions that pmod-cli asks for, against those that are installed; read from its own metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "pmod-cli"
EXTRAS = ("eval", "profile", "train", "plot")
"""Those that a user installs; the others are sums of them, or for development."""


@dataclass(frozen=True)
class Outside:
    """An installed package whose version is not one that pmod-cli declares.

    Attributes:
        name: The package.
        installed: Its version.
        wanted: What pmod-cli declares, e.g. ``<4,>=3.20``.
        remedy: The command that installs one that fits.
    """

    name: str
    installed: str
    wanted: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} {self.installed} is installed, {self.wanted} is wanted"


def install_command(extra: str | None, *, upgrade: bool = False) -> str:
    """The command that installs pmod-cli with one of its extras, or alone if None."""
    target = f"'{DISTRIBUTION}[{extra}]'" if extra else DISTRIBUTION
    return f"pip install {'--upgrade ' if upgrade else ''}{target}"


def outside(extras: Sequence[str | None] = EXTRAS) -> list[Outside]:
    """Installed packages whose versions pmod-cli does not declare; what is not installed is left out.

    Args:
        extras: Whose requirements to look at beside pmod-cli's own.

    Returns:
        One for each package, in the order of the metadata; none in a source tree, which has no metadata.
    """
    found: dict[str, Outside] = {}
    for extra, requirement in _declared(extras):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            remedy = install_command(extra, upgrade=True)
            wanted = str(requirement.specifier)
            found.setdefault(requirement.name, Outside(requirement.name, installed, wanted, remedy))
    return list(found.values())


def requirement_of(name: str) -> str:
    """How pmod-cli asks for a package, e.g. ``lmms-eval<0.8,>=0.7.3``; its name alone if it does not."""
    for _, requirement in _declared(EXTRAS):
        if requirement.name == name:
            return f"{name}{requirement.specifier}"
    return name


def _declared(extras: Sequence[str | None]) -> Iterator[tuple[str | None, Requirement]]:
    """The requirements that hold on this machine, each with the extra that brings it, None for pmod-cli itself."""
    try:
        from packaging.requirements import Requirement

        lines = requires(DISTRIBUTION) or []
    except (ImportError, PackageNotFoundError):  # a broken environment, which other checks report
        return
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        for extra in dict.fromkeys((None, *extras)):
            if marker is None or marker.evaluate({"extra": extra or ""}):
                yield extra, requirement
                break
