"""What can be known to be wrong before a model is loaded."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.data.dataset import ConversationData
from pmod_cli.extras import installed, require
from pmod_cli.families import find_family
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import Recipe, TrainSettings

# What may be changed when a run is resumed: none of it decides what is learned from which sample.
_FREE_TO_CHANGE = {
    "gradient_checkpointing",
    "logging_steps",
    "max_bad_samples",
    "micro_batch_size",
    "num_workers",
    "report_to",
    "router_stats_steps",
    "save_steps",
}


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps a run takes, and how many micro batches make one.

    Attributes:
        steps: Optimizer steps.
        accumulation: Micro batches a process and step.
        world: Processes.
    """

    steps: int
    accumulation: int
    world: int


def sharding() -> str | None:
    """How accelerate was told to shard the model over processes: ``fsdp``, ``zero1`` to ``zero3``, or None."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        return "fsdp"
    return None


def plan_steps(settings: TrainSettings, samples: int, world: int) -> Schedule:
    """Steps and accumulation for a number of samples and processes.

    Raises:
        PmodError: The global batch cannot be divided.
    """
    accumulation, remainder = divmod(settings.global_batch_size, settings.micro_batch_size * world)
    if remainder or not accumulation:
        raise PmodError(
            f"train.global_batch_size={settings.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={settings.micro_batch_size} times {world} processes"
        )
    steps = settings.max_steps
    if steps <= 0:
        steps = max(1, math.ceil(math.ceil(samples / settings.global_batch_size) * settings.epochs))
    return Schedule(steps, accumulation, world)


def check_family(model: str | Path, recipe: Recipe) -> None:
    """Refuse a recipe that is meant for another family than the checkpoint's, where the config lies here.

    Raises:
        PmodError: They differ, the config is not JSON, or no family has its model type.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        return  # a hub id: loading it finds out
    try:
        found = find_family(str(json.loads(path.read_text(encoding="utf-8")).get("model_type")))
    except (ValueError, AttributeError) as error:
        raise PmodError(f"{path} is not a model's config: {error}") from error
    if recipe.family is not None and recipe.family != found.name:
        raise PmodError(
            f"recipe {recipe.name} is for {recipe.family}, and {model} is {found.name}",
            "choose another with --recipe",
        )


def check_extras(settings: TrainSettings) -> None:
    """Refuse a recipe that asks for packages which are not installed, or cannot be imported.

    Raises:
        MissingExtraError: One is missing.
        BrokenPackageError: One is broken.
    """
    if settings.lora is not None:
        require("peft")
    if "tensorboard" in settings.report_to:
        require("tensorboard")
    if "wandb" in settings.report_to and not installed("wandb"):
        raise PmodError("wandb is not installed", "pip install wandb")


def check_data_fits(data: ConversationData, limit: int) -> None:
    """The quick part of `pmod data check`: records, and whether their image files are there.

    Raises:
        PmodError: More than ``limit`` samples cannot be used.
    """
    bad = {**data.bad, **data.missing_images()}
    if len(bad) > limit:
        name, reason = next(iter(bad.items()))
        raise PmodError(
            f"{len(bad)} samples cannot be used (train.max_bad_samples is {limit}); the first: {name}: {reason}",
            "see pmod data check",
        )


def identify(recipe: Recipe, model: str | Path, fingerprint: str) -> dict[str, Any]:
    """What must not change when a run is resumed."""
    train = recipe.train.model_dump(mode="json", exclude=_FREE_TO_CHANGE)
    return {"data": fingerprint, "recipe": train, "model": str(model)}


def check_identity(path: Path, identity: dict[str, Any], *, resuming: bool) -> None:
    """Refuse to resume with other data, another recipe or another model; write down what this run is.

    Raises:
        PmodError: Something changed.
    """
    if resuming and path.exists():
        before = json.loads(path.read_text())
        changed = [key for key, value in identity.items() if before.get(key) != value]
        if changed:
            raise PmodError(
                f"cannot resume {path.parent}: the {' and the '.join(changed)} changed since it was begun",
                "--force (without --resume) starts anew",
            )
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(identity, indent=2))
    temporary.replace(path)
