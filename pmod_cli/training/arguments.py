"""A recipe's settings as transformers' `TrainingArguments`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import TrainSettings
from pmod_cli.training.preflight import Schedule, sharding
from pmod_cli.training.trainer import KEPT_CHECKPOINTS


def training_arguments(settings: TrainSettings, work: Path, schedule: Schedule) -> TrainingArguments:
    """The Trainer's arguments; making them starts the process group under torchrun.

    Args:
        settings: The recipe's.
        work: Folder for checkpoints.
        schedule: Steps and accumulation.

    Raises:
        PmodError: This machine cannot do what is asked for.
    """
    on_gpu = torch.cuda.is_available()
    if sharding() is not None and not on_gpu:
        # Tried: on the CPU the Trainer silently runs DDP when FSDP is asked for.
        raise PmodError(
            "FSDP and DeepSpeed need a GPU: on the CPU the Trainer would silently run DDP in their place",
            "start it with torchrun and no --config_file, which is DDP",
        )
    if settings.dtype == "float16" and not on_gpu:
        raise PmodError("train.dtype=float16 needs a GPU", "bfloat16 and float32 run on the CPU")
    try:
        return TrainingArguments(
            output_dir=str(work),
            max_steps=schedule.steps,
            per_device_train_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=schedule.accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler,
            warmup_steps=math.ceil(schedule.steps * settings.warmup_ratio),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            adam_beta2=settings.adam_beta2,
            bf16=settings.dtype == "bfloat16",
            fp16=settings.dtype == "float16",
            # Worker processes cost more than they bring where the model itself runs on the CPU.
            dataloader_num_workers=settings.num_workers if on_gpu else 0,
            dataloader_pin_memory=on_gpu,
            logging_steps=settings.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=settings.save_steps,
            save_total_limit=KEPT_CHECKPOINTS,
            report_to=list(settings.report_to) or "none",
            seed=settings.seed,
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            ddp_find_unused_parameters=False,
            use_cpu=not on_gpu,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PmodError(f"this machine cannot run the recipe: {lines[0]}") from error
