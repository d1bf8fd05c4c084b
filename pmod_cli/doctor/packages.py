"""The packages that pmod itself requires, as far as others break them, and how torch and torchvision go together."""

from __future__ import annotations

from importlib.metadata import requires

from pmod_cli.extras import OPTIONAL, Package
from pmod_cli.output.versions import version_of


def pair_problem() -> str | None:
    """Why the installed torchvision is not the one of the installed torch; None if it is.

    Both have to be importable.
    """
    import torch
    import torchvision  # type: ignore[import-untyped]  # ships no types
    from packaging.requirements import Requirement

    found = f"torchvision {torchvision.__version__} does not go with torch {torch.__version__}"
    for requirement in map(Requirement, requires("torchvision") or []):
        wanted = requirement.specifier
        if requirement.name == "torch" and not wanted.contains(torch.__version__, prereleases=True):
            return f"{found}: it wants torch {wanted}"
    builds = torchvision.version.cuda, torch.version.cuda  # torchvision's is a number: 13000 for 13.0
    if builds[0] and builds[1] and int(builds[0]) // 1000 != int(builds[1].split(".")[0]):
        return f"{found}: one was built for CUDA {int(builds[0]) // 1000}, the other for CUDA {builds[1]}"
    return None


def _use_operators() -> None:
    """Call one of torchvision's compiled operators: those of another build load, and then are not there."""
    import torch
    import torchvision

    if problem := pair_problem():
        raise RuntimeError(problem)
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def pair_remedy() -> str | None:
    """The command that installs a torchvision for the installed torch; None if there is no torch."""
    if not (torch := version_of("torch")):
        return None
    wanted = f"'torch=={torch.split('+')[0]}' torchvision"
    return f"pip install --force-reinstall {wanted}, both from the index that torch came from"


REQUIRED = {
    package.root: package
    for package in (
        Package("torch", ("torch",)),
        Package("torchvision", ("torchvision",), exercise=_use_operators, mend=pair_remedy),
        # transformers imports its modules when they are used, and pmod's classes as soon as it is itself.
        Package("transformers", ("transformers", "transformers.models.llava.modeling_llava")),
        Package("accelerate", ("accelerate",)),
    )
}
"""By top-level module."""

PACKAGES = REQUIRED | OPTIONAL
"""All that are checked, by top-level module, in the order in which they are shown."""
