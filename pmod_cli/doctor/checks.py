"""The checks, one function each. They run in child processes (see `probe`)."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli.doctor.attention import attention
from pmod_cli.doctor.commands import COMMANDS, Command
from pmod_cli.doctor.packages import PACKAGES, version_of
from pmod_cli.extras import Package, import_for_real, installed, require_if_installed, starting
from pmod_cli.output.errors import BrokenPackageError, MissingExtraError, PmodError


def result(
    status: str, *, error: str | None = None, remedy: str | None = None, **facts: Any
) -> dict[str, Any]:
    """What a check found: ``status`` is works, missing or broken."""
    return {"status": status, "error": error, "remedy": remedy, "facts": facts}


def check_package(package: Package) -> dict[str, Any]:
    """Import a package for real."""
    try:
        import_for_real(package, package.extra)
    except MissingExtraError as error:
        return result("missing", error=error.message, remedy=error.hint)
    except BrokenPackageError as error:
        return result("broken", error=error.reason, remedy=error.hint, version=version_of(package.root))
    module = importlib.import_module(package.root)
    return result("works", version=getattr(module, "__version__", None) or version_of(package.root))


def check_command(command: Command) -> dict[str, Any]:
    """Import what a verb imports."""
    try:
        with starting(command.name):
            require_if_installed(*command.uses)
            for module in command.modules:
                importlib.import_module(module)
    except PmodError as error:
        return result("broken", error=error.message, remedy="see the packages above")
    return result("works")


def check_gpus() -> dict[str, Any]:
    """The GPUs as torch sees them, memory in bytes; and what the driver says where torch sees none."""
    import torch

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    facts: dict[str, Any] = {"driver": _driver(), "cuda": torch.version.cuda, "gpus": [], "why_none": None}
    if not available:
        if warned:  # e.g. that the driver is too old for this build of torch
            facts["why_none"] = " ".join(str(warned[0].message).split())[:300]
        elif facts["driver"]:
            facts["why_none"] = f"the driver is there, and torch {torch.__version__} does not use it"
        return result("works", **facts)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        facts["gpus"].append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": bf16,
            }
        )
    return result("works", **facts)


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if there is none, or it does not answer within five seconds."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(output.splitlines()), "").strip() or None


def check_places() -> dict[str, Any]:
    """Where things are kept, and whether the hub may be asked."""
    from huggingface_hub import constants

    from pmod_cli.evaluation.folder import answers_cache

    places: dict[str, str | None] = {"models": constants.HF_HUB_CACHE, "data sets": _data_sets()}
    places["answers"] = str(answers_cache())
    caches = [{"what": what, "path": path, "free_bytes": _free(path)} for what, path in places.items()]
    return result("works", caches=caches, offline=bool(constants.HF_HUB_OFFLINE))


def _data_sets() -> str | None:
    """Where evaluations keep their data, else where training does; None if neither can be installed here."""
    if _works("lmms_eval"):
        from pmod_cli.evaluation.requirements import cache_folder

        return str(cache_folder())
    if _works("datasets"):
        import datasets

        return str(datasets.config.HF_DATASETS_CACHE)
    return None


def _works(root: str) -> bool:
    return installed(root) and check_package(PACKAGES[root])["status"] == "works"


def _free(path: str | None) -> int | None:
    """Bytes that are free where a folder is, or would be made."""
    if path is None:
        return None
    folder = Path(path).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"package {root}": partial(check_package, package) for root, package in PACKAGES.items()},
    **{f"command {name}": partial(check_command, command) for name, command in COMMANDS.items()},
    "gpus": check_gpus,
    "attention": lambda: result("works", **attention()),
    "places": check_places,
}
"""By name; a check that raises is broken."""
