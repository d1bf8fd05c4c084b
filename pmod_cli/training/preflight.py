"""What can be known to be wrong before a model is loaded, and the Trainer's arguments."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments

from pmod_cli.checkpoints.load import read_config
from pmod_cli.data.dataset import DataSource
from pmod_cli.devices import world_size
from pmod_cli.extras import installed, require
from pmod_cli.families import find_family
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.files import check_place, write_json
from pmod_cli.output.reading import read_json
from pmod_cli.recipe import Recipe, TrainSettings, check_recipe
from pmod_cli.training.finish import EVENTS
from pmod_cli.training.trainer import KEPT_CHECKPOINTS, STAGING, last_checkpoint

HOLDS = ("checkpoint-*", "*.jsonl", "run.json", STAGING, EVENTS, ".*.partial")
"""What a training folder holds."""

# What may be changed when a run is resumed: none of it decides what is learned from which sample.
_FREE_TO_CHANGE = {
    "gradient_checkpointing", "logging_steps", "max_bad_samples", "micro_batch_size", "num_workers", "report_to",
    "router_stats_steps", "save_steps",
}  # fmt: skip


_ALIKE = {
    "learning_rate", "weight_decay", "max_grad_norm", "adam_beta2", "logging_steps", "save_steps", "seed",
}  # fmt: skip
"""Settings that the Trainer's arguments have under the same name."""


def sharding() -> str | None:
    """How accelerate was told to shard the model over processes: ``fsdp``, ``zero1`` to ``zero3``, or None."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        return "fsdp"
    return None


def check_model(model: str | Path, recipe: Recipe) -> None:
    """Refuse a checkpoint that is not there, and a recipe for another family or with packages that are missing."""
    check_recipe(recipe, find_family(read_config(model).model_type).name)
    if recipe.train.lora is not None:
        require("peft")
    if "tensorboard" in recipe.train.report_to:
        require("tensorboard")
    if "wandb" in recipe.train.report_to and not installed("wandb"):
        raise PmodError("wandb is not installed", "pip install wandb")


def check_output(
    output: Path, work: Path, inputs: Sequence[str | Path], *, resume: bool, force: bool
) -> None:
    """Refuse to overwrite a result or an unfinished run without being asked to, and what pmod did not write ever."""
    if output.is_file():
        raise PmodError(f"{output} is a file, not a folder")
    check_place(output, force, inputs)
    check_place(work, True, inputs, HOLDS)
    if last_checkpoint(work) is not None and not (resume or force):
        raise PmodError(f"{work} holds an unfinished run", "--resume goes on with it, --force starts anew")


def check_data_fits(data: DataSource, limit: int) -> None:
    """Refuse data of which more than ``limit`` samples cannot be used; pictures are looked for, and not opened."""
    bad = {**data.bad, **data.missing_images()}
    if len(bad) > limit:
        name, reason = next(iter(bad.items()))
        raise PmodError(
            f"{len(bad)} samples cannot be used (train.max_bad_samples is {limit}); the first: {name}: {reason}",
            "see pmod data check",
        )


def plan_steps(settings: TrainSettings, samples: int, world: int) -> tuple[int, int]:
    """Optimizer steps of a run, and micro batches that each process takes for one; `PmodError` if that is not whole."""
    accumulation, remainder = divmod(settings.global_batch_size, settings.micro_batch_size * world)
    if remainder or not accumulation:
        raise PmodError(
            f"train.global_batch_size={settings.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={settings.micro_batch_size} times {world} processes"
        )
    steps = settings.max_steps
    if steps <= 0:
        steps = max(1, math.ceil(math.ceil(samples / settings.global_batch_size) * settings.epochs))
    return steps, accumulation


def training_arguments(
    settings: TrainSettings, work: Path, steps: int, accumulation: int
) -> TrainingArguments:
    """The Trainer's arguments, if this machine can follow them; making them starts the process group under torchrun."""
    on_gpu = torch.cuda.is_available()
    if sharding() is not None and settings.distill:
        raise PmodError(
            "train.distill runs with whole models, and accelerate was told to shard this one",
            "use recipes/accelerate/ddp.yaml",
        )
    if sharding() is not None and not on_gpu:
        # Tried: on the CPU the Trainer silently runs DDP when FSDP is asked for.
        raise PmodError(
            "FSDP and DeepSpeed need a GPU: on the CPU the Trainer would silently run DDP in their place",
            "start it with torchrun and no --config_file, which is DDP",
        )
    if settings.dtype == "float16" and not on_gpu:
        raise PmodError("train.dtype=float16 needs a GPU", "bfloat16 and float32 run on the CPU")
    # The recipe decides, whatever the launcher's config says.
    precisions = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}
    os.environ["ACCELERATE_MIXED_PRECISION"] = precisions[settings.dtype]
    try:
        return TrainingArguments(
            output_dir=str(work),
            max_steps=steps,
            per_device_train_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type=settings.lr_scheduler,
            warmup_steps=math.ceil(steps * settings.warmup_ratio),
            bf16=settings.dtype == "bfloat16",
            fp16=settings.dtype == "float16",
            # Worker processes cost more than they bring where the model itself runs on the CPU.
            dataloader_num_workers=settings.num_workers if on_gpu else 0,
            dataloader_pin_memory=on_gpu,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_total_limit=KEPT_CHECKPOINTS,
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            ddp_find_unused_parameters=False,
            use_cpu=not on_gpu,
            **settings.model_dump(include=_ALIKE),
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise PmodError(f"this machine cannot run the recipe: {first_line(error)}") from error


def check_identity(work: Path, recipe: Recipe, model: str | Path, data: str, resuming: bool) -> None:
    """Refuse to resume with other data (a SHA-256), recipe, model or sharding; write these to ``work/run.json``."""
    train = recipe.train.model_dump(mode="json", exclude=_FREE_TO_CHANGE)
    identity = {"data": data, "recipe": train, "model": str(model), "sharding": sharding()}
    if (sharding() or "").startswith("zero"):
        identity["sharding"] = (
            f"{sharding()} over {world_size()}"  # DeepSpeed resumes with as many processes only
        )
    path = work / "run.json"
    before = read_json(path) if resuming and path.exists() else identity
    changed = [key for key, value in identity.items() if before.get(key) != value]
    if changed:
        raise PmodError(
            f"cannot resume {work}: the {' and the '.join(changed)} changed since it was begun",
            "--force (without --resume) starts anew",
        )
    write_json(path, identity)
