"""A whole fine-tuning run: settings, preflight, data, model, Trainer, result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from pmod_cli.checkpoints.write import check_space
from pmod_cli.data.batches import Collator, EncodedDataset, OrderedSampler, longest_sample
from pmod_cli.data.dataset import ConversationData, open_data
from pmod_cli.devices import world_size
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import Recipe
from pmod_cli.training import preflight
from pmod_cli.training.callbacks import Preempted, RatioWarmup, StopAtSignal
from pmod_cli.training.finish import METRICS, save_result
from pmod_cli.training.memory import MemoryEstimate, describe, device_memory, estimate
from pmod_cli.training.model import PartCount, count_parts, load_for_training
from pmod_cli.training.monitor import BadSampleLog, Monitor, ProgressCallback, make_probe, read_metrics
from pmod_cli.training.trainer import (
    KEPT_CHECKPOINTS,
    STAGING,
    PmodTrainer,
    checkpoint_bytes,
    last_checkpoint,
    peak_memory,
)

BAD_SAMPLES = "bad_samples.jsonl"

Announce = Callable[[list[PartCount], MemoryEstimate], None]
"""Called once before the first step, with what is trained and the memory it will take."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        output: The finished checkpoint.
        steps: Optimizer steps, those before a resume included.
        resumed_from: The step that this process went on from, or None.
        samples: Usable records.
        bad_samples: id -> reason, of records left out or replaced.
        first_loss: The first that was logged.
        final_loss: The last that was logged.
        seconds: Wall time of this process's training loop.
        parts: Parameters by part.
        memory: The estimate, as `MemoryEstimate.to_dict` has it.
        peak_memory_bytes: The most that this process really held.
    """

    output: str
    steps: int
    resumed_from: int | None
    samples: int
    bad_samples: dict[str, str]
    first_loss: float | None
    final_loss: float | None
    seconds: float
    parts: list[PartCount]
    memory: dict[str, Any]
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can write."""
        return asdict(self)


def finetune(
    model: str | Path,
    data: str | Path,
    images: Path | None,
    output: Path,
    *,
    recipe: Recipe,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
    announce: Announce | None = None,
    merge_lora: bool = False,
) -> FinetuneResult:
    """Fine-tune a dense or p-MoD checkpoint on LLaVA data.

    While it runs, everything lies in ``OUTPUT.training`` (checkpoints, ``metrics.jsonl``); ``output`` appears
    only when it is complete.

    Args:
        model: Checkpoint folder or hub id.
        data: LLaVA JSON or JSONL; or a folder or hub id that `datasets` opens.
        images: The folder that a file's image names are relative to.
        output: The new checkpoint.
        recipe: Its ``train`` section is followed.
        resume: Go on from the last complete checkpoint, if there is one.
        force: Replace ``output``, and start an unfinished run anew.
        progress: See `ProgressCallback`.
        announce: See `Announce`.
        merge_lora: Fold LoRA into the weights at the end; without it a LoRA run's output is a PEFT adapter.

    Raises:
        PmodError: The input is wrong: found before training starts wherever that is possible.
        GateError: A loss or gradient that is not finite; too many bad samples.
        Preempted: SIGTERM came, and a checkpoint was saved.
    """
    run = _preflight(model, data, images, output, recipe, resume, force, merge_lora)
    set_seed(recipe.train.seed)  # the Trainer does it too, but LoRA's weights are drawn before
    network, processor = load_for_training(
        run.checkpoint if run.checkpoint and run.whole else model, recipe.train
    )
    samples = run.conversations
    dataset = EncodedDataset(samples, samples.pictures, processor, recipe.train.max_length)
    parts, memory = _plan(run, network, dataset)
    if announce is not None and run.main:
        announce(parts, memory)
    trainer = _make_trainer(run, network, dataset, progress)
    seconds = _train(run, trainer, memory)
    result = _describe_result(run, trainer, parts, memory, seconds)
    _save(run, trainer, processor, result, merge_lora)
    return result


@dataclass(frozen=True)
class _Run:
    """A run that passed its preflight.

    Attributes:
        model: The checkpoint that training starts from.
        data: As it was named.
        output: The new checkpoint.
        work: Where everything lies until then.
        recipe: Its ``train`` section is followed.
        conversations: The usable samples.
        steps: Optimizer steps in all.
        arguments: The Trainer's.
        checkpoint: What is resumed from, or None.
    """

    model: str | Path
    data: str | Path
    output: Path
    work: Path
    recipe: Recipe
    conversations: ConversationData
    steps: int
    arguments: TrainingArguments
    checkpoint: Path | None

    @property
    def main(self) -> bool:
        """Whether this process shows and writes."""
        return self.arguments.process_index == 0

    @property
    def whole(self) -> bool:
        """Whether the checkpoint that is resumed from is an ordinary one.

        LoRA adapters and shards are no ordinary checkpoints: the Trainer itself loads them into the wrapped model.
        """
        ordinary = self.recipe.train.lora is None and preflight.sharding() is None
        return self.checkpoint is not None and ordinary


def _preflight(
    model: str | Path,
    data: str | Path,
    images: Path | None,
    output: Path,
    recipe: Recipe,
    resume: bool,
    force: bool,
    merge_lora: bool,
) -> _Run:
    """Check all that can be checked without the model, and open the training folder."""
    settings = recipe.train
    preflight.check_model(model, recipe)
    if merge_lora and settings.lora is None:
        raise PmodError("--merge is for LoRA, and the recipe has no train.lora")
    output = output.resolve()
    work = output.with_name(output.name + ".training")
    preflight.check_output(output, work, resume=resume, force=force)
    conversations = ConversationData(open_data(data, images))
    preflight.check_data_fits(conversations, settings.max_bad_samples)
    schedule = preflight.plan_steps(settings, len(conversations), world_size())
    arguments = preflight.training_arguments(settings, work, schedule)
    checkpoint = last_checkpoint(work) if resume else None
    run = _Run(model, data, output, work, recipe, conversations, schedule.steps, arguments, checkpoint)
    if run.main:
        _open_work(run, anew=force and not resume)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return run


def _open_work(run: _Run, *, anew: bool) -> None:
    try:
        if anew:
            shutil.rmtree(run.work, ignore_errors=True)
        run.work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(run.work / STAGING, ignore_errors=True)  # a checkpoint that a kill cut off
        resuming = run.checkpoint is not None
        preflight.check_identity(run.work, run.recipe, run.model, run.conversations.fingerprint, resuming)
    except OSError as error:
        raise PmodError(f"cannot write {run.work}: {error.strerror}", "choose another --output") from error


def _plan(run: _Run, network: Any, dataset: EncodedDataset) -> tuple[list[PartCount], MemoryEstimate]:
    """What is trained and the memory it takes; refuses a disk that is too small for the checkpoints."""
    settings = run.recipe.train
    parts = count_parts(network)
    copies = 1 if run.checkpoint else min(KEPT_CHECKPOINTS + 1, -(-run.steps // settings.save_steps))
    check_space(run.work, copies * checkpoint_bytes(parts, adapter_only=settings.lora is not None))
    workload = describe(network, *longest_sample(dataset))
    shards = preflight.sharding()
    return parts, estimate(workload, settings, run.arguments.world_size, shards, device_memory())


def _make_trainer(
    run: _Run, network: Any, dataset: EncodedDataset, progress: ProgressCallback | None
) -> PmodTrainer:
    """The Trainer with its callbacks."""
    settings = run.recipe.train
    collator = Collator(dataset.processor, image_for_text=run.arguments.world_size > 1)
    # Where the model lies in pieces on all processes, all have to take part in a look at the routers.
    looks = preflight.sharding() is not None or run.main
    probe = make_probe(network, dataset, collator, settings.micro_batch_size) if looks else []
    monitor = Monitor(run.work / METRICS, progress, probe, settings.router_stats_steps)
    warmup = settings.ratio_warmup_steps
    group = settings.global_batch_size if settings.group_by_modality_length else None
    trainer = PmodTrainer(
        model=network,
        args=run.arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=dataset.processor,
        sampler=OrderedSampler(dataset.samples, settings.seed, group),
        bad=BadSampleLog(run.work / BAD_SAMPLES, settings.max_bad_samples, run.conversations.bad),
        router_learning_rate=settings.router_learning_rate,
        weights_loaded=run.whole,
        callbacks=[monitor, *([RatioWarmup(network, warmup)] if warmup else [])],
    )
    monitor.trainer = trainer
    return trainer


def _train(run: _Run, trainer: PmodTrainer, memory: MemoryEstimate) -> float:
    """Train, and give the seconds it took.

    Raises:
        PmodError: The GPU's memory is too small.
        Preempted: SIGTERM came before the last step.
    """
    began = time.perf_counter()
    stopper = StopAtSignal()
    trainer.add_callback(stopper)
    try:
        with stopper.listening():
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise PmodError(
            f"step {trainer.state.global_step + 1}: out of memory on the GPU",
            "; ".join(memory.advice) or "lower train.micro_batch_size, and go on with --resume",
        ) from error
    if stopper.asked and trainer.state.global_step < run.steps:
        raise Preempted(
            f"stopped by SIGTERM after step {trainer.state.global_step}; a checkpoint is saved in {run.work}",
            "go on with --resume",
        )
    return time.perf_counter() - began


def _describe_result(
    run: _Run, trainer: PmodTrainer, parts: list[PartCount], memory: MemoryEstimate, seconds: float
) -> FinetuneResult:
    losses = [row["loss"] for row in read_metrics(run.work / METRICS) if "loss" in row]
    return FinetuneResult(
        output=str(run.output),
        steps=trainer.state.global_step,
        resumed_from=int(run.checkpoint.name.rpartition("-")[2]) if run.checkpoint else None,
        samples=len(run.conversations),
        bad_samples=trainer.bad.all(),
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        seconds=seconds,
        parts=parts,
        memory=memory.to_dict(),
        peak_memory_bytes=peak_memory(),
    )


def _save(run: _Run, trainer: PmodTrainer, processor: Any, result: FinetuneResult, merge_lora: bool) -> None:
    weights = trainer.gathered_weights()
    if not run.main:
        return
    summary = {
        "result": result.to_dict(),
        "recipe": run.recipe.model_dump(mode="json"),
        "model": str(run.model),
        "seed": run.recipe.train.seed,
        "data": str(run.data),
        "data_sha256": run.conversations.fingerprint,
        "processes": run.arguments.world_size,
    }
    save_result(
        trainer.accelerator.unwrap_model(trainer.model),
        processor,
        run.output,
        run.work,
        recipe=run.recipe,
        summary=summary,
        weights=weights,
        merge_lora=merge_lora,
    )
