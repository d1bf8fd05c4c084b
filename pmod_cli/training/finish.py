"""The finished checkpoint, put in its place with all that says where it came from."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from pmod_cli import __version__
from pmod_cli.output.errors import BrokenPackageError, MissingExtraError, PmodError
from pmod_cli.recipe import Recipe
from pmod_cli.training.lora import merge
from pmod_cli.training.monitor import read_metrics
from pmod_cli.training.plots import plot_run
from pmod_cli.training.trainer import PmodTrainer, unwritable

SUMMARY = "training.json"
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
PICTURE = "training.png"
EVENTS = "runs"
"""Where TensorBoard's events are, named by transformers."""

_log = logging.getLogger(__name__)


def gathered_weights(trainer: PmodTrainer) -> dict[str, torch.Tensor] | None:
    """The whole state dict of a model in pieces, on the main process; None where every process has it all.

    All processes must call it.
    """
    trainer.accelerator.wait_for_everyone()
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    weights: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


def save_result(
    network: Any,
    processor: Any,
    output: Path,
    work: Path,
    *,
    recipe: Recipe,
    summary: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
    merge_lora: bool = False,
) -> None:
    """Write the checkpoint beside its place, move it there, and remove the training folder.

    Args:
        network: The trained model, or the PEFT model around it.
        processor: As it was used.
        output: The checkpoint's folder.
        work: The training folder, with ``metrics.jsonl``.
        recipe: The resolved recipe.
        summary: Written to ``training.json``.
        weights: See `gathered_weights`.
        merge_lora: Fold LoRA in.

    Raises:
        PmodError: It cannot be written.
    """
    dtype = getattr(torch, recipe.train.dtype)
    if merge_lora:
        network = merge(network)
    if weights is None:
        network.to(dtype)
    else:
        network.config.dtype = dtype
        weights = {
            name: weight.to(dtype) if weight.is_floating_point() else weight
            for name, weight in weights.items()
        }
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        network.save_pretrained(temporary, **({} if weights is None else {"state_dict": weights}))
        processor.save_pretrained(temporary)
        shutil.copy(work / METRICS, temporary / METRICS)
        if (work / EVENTS).is_dir():
            shutil.copytree(work / EVENTS, temporary / EVENTS)
        (temporary / SUMMARY).write_text(json.dumps({**summary, "versions": _versions()}, indent=2))
        text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)
        (temporary / RECIPE).write_text(text)
        _draw(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = unwritable(error)
        if reason is None:
            raise
        raise PmodError(
            f"cannot write {output}: {reason}", "the last checkpoint is kept: free some space and --resume"
        ) from error
    if output.exists():
        old = output.with_name(f".{output.name}.old.{os.getpid()}")
        output.replace(old)
        temporary.replace(output)
        shutil.rmtree(old)
    else:
        temporary.replace(output)
    shutil.rmtree(work)


def _draw(folder: Path) -> None:
    try:
        plot_run(read_metrics(folder / METRICS), folder / PICTURE)
    except (MissingExtraError, BrokenPackageError) as error:
        _log.warning("no %s: %s", PICTURE, error)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate")
    return {
        "pmod": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
