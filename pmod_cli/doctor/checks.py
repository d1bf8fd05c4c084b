"""The checks, one function each. They run in child processes (see `probe`)."""

from __future__ import annotations

import importlib
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli.doctor.commands import COMMANDS, Command
from pmod_cli.doctor.packages import PACKAGES
from pmod_cli.extras import Package, import_for_real, require_if_installed, starting
from pmod_cli.output.errors import BrokenPackageError, MissingExtraError, PmodError
from pmod_cli.output.versions import version_of


def result(
    status: str, *, error: str | None = None, remedy: str | None = None, **facts: Any
) -> dict[str, Any]:
    """What a check found: ``status`` is works, missing or broken."""
    return {"status": status, "error": error, "remedy": remedy, "facts": facts}


def check_package(package: Package) -> dict[str, Any]:
    """Import a package for real."""
    try:
        import_for_real(package)
    except MissingExtraError as error:
        return result("missing", error=error.message, remedy=error.hint)
    except BrokenPackageError as error:
        return result("broken", error=error.reason, remedy=error.hint)
    version = getattr(importlib.import_module(package.root), "__version__", None)
    return result("works", version=version or version_of(package.name))


def check_command(command: Command) -> dict[str, Any]:
    """Import what a command imports."""
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
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver, why = _driver(), None
    if not count and warned:  # e.g. that the driver is too old for this build of torch
        why = " ".join(str(warned[0].message).split())[:300]
    elif not count and driver:
        why = f"the driver is there, and torch {torch.__version__} does not use it"
    gpus = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": bf16,
            }
        )
    return result("works", driver=driver, cuda=torch.version.cuda, gpus=gpus, why_none=why)


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if there is none, or it does not answer within five seconds."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(output.splitlines()), "").strip() or None


def attention() -> dict[str, Any]:
    """The attention back end of a p-MoD model for which none is asked: asked of transformers, not guessed.

    Returns:
        ``implementation`` as transformers names it, ``why``, and ``installed``: others that can be asked for.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
    from pmod_cli.modeling.attention import PLAN_FREE

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = PmodLlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 8, "num_key_value_heads": 1, **tiny},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 8, **tiny},
    )
    with torch.device("meta"):
        model: Any = PmodLlavaForConditionalGeneration(config)
    chosen = model.config.text_config._attn_implementation
    kernel = ", as SDPA is not available here"
    if chosen == PLAN_FREE:
        kernel = (
            ": SDPA by PyTorch's flash and memory-efficient kernels, which prepare nothing for new shapes"
        )
    others = ["flash_attention_2"] if is_flash_attn_2_available() else []
    more = (
        "installed: ask for it with attn_implementation=flash_attention_2" if others else "not to be had here"
    )
    why = f"transformers' choice for p-MoD models{kernel}; flash-attn is {more}"
    return {"implementation": chosen, "why": why, "installed": others}


def check_places() -> dict[str, Any]:
    """Where things are kept, bytes free there, and whether the hub may be asked."""
    from huggingface_hub import constants

    from pmod_cli.checkpoints.write import free_space
    from pmod_cli.evaluation.folder import answers_cache

    places = {"models": Path(constants.HF_HUB_CACHE), "data sets": _data_sets(), "answers": answers_cache()}
    caches = [
        {"what": what, "path": path and str(path), "free_bytes": path and free_space(path / "new")}
        for what, path in places.items()
    ]
    return result("works", caches=caches, offline=bool(constants.HF_HUB_OFFLINE))


def _data_sets() -> Path | None:
    """Where evaluations keep their data, else where training does; None if neither can be installed here."""
    works = {root for root in ("lmms_eval", "datasets") if check_package(PACKAGES[root])["status"] == "works"}
    if "lmms_eval" in works:
        from pmod_cli.evaluation.requirements import cache_folder

        return cache_folder()
    if "datasets" in works:
        import datasets

        return Path(datasets.config.HF_DATASETS_CACHE)
    return None


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"package {root}": partial(check_package, package) for root, package in PACKAGES.items()},
    **{f"command {name}": partial(check_command, command) for name, command in COMMANDS.items()},
    "gpus": check_gpus,
    "attention": lambda: result("works", **attention()),
    "places": check_places,
}
"""By name; a check that raises is broken."""
