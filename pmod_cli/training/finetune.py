"""A whole fine-tuning run: settings, preflight, data, model, Trainer, result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

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
    checkpoint_step,
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
        first_loss: The first loss that was logged.
        final_loss: The last loss that was logged.
        seconds: Wall time of this process's training loop.
        parts: Parameters by part.
        memory: The estimate, as `MemoryEstimate.to_dict` has it.
        peak_memory_bytes: The most memory that this process really held.
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

    def to_text(self) -> str:
        """The run in one line."""
        losses = [f"{loss:.4f}" for loss in (self.first_loss, self.final_loss) if loss is not None]
        return (
            f"{self.output}: {self.steps} steps, loss {' -> '.join(losses)}, "
            f"{self.seconds:.0f} s, {len(self.bad_samples)} bad samples"
        )


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
    run = _Run(model, data, output, recipe, resume)
    run.check(images, force=force, merge_lora=merge_lora)
    run.open_folder(anew=force and not resume)
    set_seed(recipe.train.seed)  # the Trainer does it too, but LoRA's weights are drawn before
    run.load()
    if announce is not None and run.main:
        announce(run.parts, run.memory)
    trainer = run.make_trainer(progress)
    seconds = run.train(trainer)
    result = run.result(trainer, seconds)
    run.save(trainer, result, merge_lora)
    return result


class _Run:
    """The steps of a run, in the order of the methods.

    Everything lies in the folder ``work`` until the last step makes ``output`` of it.
    """

    def __init__(
        self, model: str | Path, data: str | Path, output: Path, recipe: Recipe, resume: bool
    ) -> None:
        self.model, self.data, self.recipe, self.settings = model, data, recipe, recipe.train
        self.output = output.resolve()
        self.work = self.output.with_name(self.output.name + ".training")
        self.resume = resume
        self.checkpoint = last_checkpoint(self.work) if resume else None
        self.shards = preflight.sharding()
        # LoRA adapters and shards are no ordinary checkpoints: the Trainer itself loads them into the wrapped model.
        self.loads_checkpoint = self.checkpoint is not None and recipe.train.lora is None and not self.shards

    def check(self, images: Path | None, *, force: bool, merge_lora: bool) -> None:
        """Check all that can be checked without the model."""
        settings = self.settings
        preflight.check_model(self.model, self.recipe)
        if merge_lora and settings.lora is None:
            raise PmodError("--merge is for LoRA, and the recipe has no train.lora")
        preflight.check_output(self.output, self.work, resume=self.resume, force=force)
        self.conversations = ConversationData(open_data(self.data, images))
        preflight.check_data_fits(self.conversations, settings.max_bad_samples)
        self.steps, accumulation = preflight.plan_steps(settings, len(self.conversations), world_size())
        self.arguments = preflight.training_arguments(settings, self.work, self.steps, accumulation)
        self.main = self.arguments.process_index == 0

    def open_folder(self, *, anew: bool) -> None:
        """Make the training folder, or check that it is of the same run; the other processes wait."""
        try:
            if self.main:
                if anew:
                    shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self.work / STAGING, ignore_errors=True)  # a checkpoint that a kill cut off
                digest, resuming = self.conversations.fingerprint, self.checkpoint is not None
                preflight.check_identity(self.work, self.recipe, self.model, digest, resuming)
        except OSError as error:
            raise PmodError(
                f"cannot write {self.work}: {error.strerror}", "choose another --output"
            ) from error
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()

    def load(self) -> None:
        """Load model and processor; check that the disk takes the checkpoints; estimate the memory."""
        settings, samples = self.settings, self.conversations
        source = self.checkpoint if self.checkpoint and self.loads_checkpoint else self.model
        self.network, self.processor = load_for_training(source, settings)
        self.dataset = EncodedDataset(samples.samples, samples.pictures, self.processor, settings.max_length)
        self.parts = count_parts(self.network)
        copies = 1 if self.checkpoint else min(KEPT_CHECKPOINTS + 1, -(-self.steps // settings.save_steps))
        check_space(self.work, copies * checkpoint_bytes(self.parts, adapter_only=settings.lora is not None))
        workload = describe(self.network, *longest_sample(self.dataset))
        world = self.arguments.world_size
        self.memory = estimate(workload, settings, world, self.shards, device_memory())

    def make_trainer(self, progress: ProgressCallback | None) -> PmodTrainer:
        """The Trainer with its callbacks."""
        settings, network, dataset = self.settings, self.network, self.dataset
        collator = Collator(self.processor, image_for_text=self.arguments.world_size > 1)
        # Where the model lies in pieces on all processes, all have to take part in a look at the routers.
        looks = self.shards is not None or self.main
        probe = make_probe(network, dataset, collator, settings.micro_batch_size) if looks else []
        monitor = Monitor(self.work / METRICS, progress, probe, settings.router_stats_steps)
        warmup = settings.ratio_warmup_steps
        group = settings.global_batch_size if settings.group_by_modality_length else None
        trainer = PmodTrainer(
            model=network,
            args=self.arguments,
            train_dataset=dataset,
            data_collator=collator,
            processing_class=self.processor,
            sampler=OrderedSampler(dataset.samples, settings.seed, group),
            bad=BadSampleLog(self.work / BAD_SAMPLES, settings.max_bad_samples, self.conversations.bad),
            router_learning_rate=settings.router_learning_rate,
            weights_loaded=self.loads_checkpoint,
            callbacks=[monitor, *([RatioWarmup(network, warmup)] if warmup else [])],
        )
        monitor.trainer = trainer
        return trainer

    def train(self, trainer: PmodTrainer) -> float:
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
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise PmodError(
                f"step {trainer.state.global_step + 1}: out of memory on the GPU",
                "; ".join(self.memory.advice) or "lower train.micro_batch_size, and go on with --resume",
            ) from error
        step = trainer.state.global_step
        if stopper.asked and step < self.steps:
            raise Preempted(
                f"stopped by SIGTERM after step {step}; a checkpoint is saved in {self.work}",
                "go on with --resume",
            )
        return time.perf_counter() - began

    def result(self, trainer: PmodTrainer, seconds: float) -> FinetuneResult:
        """What the run did."""
        losses = [row["loss"] for row in read_metrics(self.work / METRICS) if "loss" in row]
        return FinetuneResult(
            output=str(self.output),
            steps=trainer.state.global_step,
            resumed_from=checkpoint_step(self.checkpoint) if self.checkpoint else None,
            samples=len(self.conversations),
            bad_samples=trainer.bad.all(),
            first_loss=losses[0] if losses else None,
            final_loss=losses[-1] if losses else None,
            seconds=seconds,
            parts=self.parts,
            memory=self.memory.to_dict(),
            peak_memory_bytes=peak_memory(),
        )

    def save(self, trainer: PmodTrainer, result: FinetuneResult, merge_lora: bool) -> None:
        """Put the finished checkpoint in its place; all processes must call it."""
        weights = trainer.gathered_weights()
        if not self.main:
            return
        summary = {
            "result": result.to_dict(),
            "recipe": self.recipe.model_dump(mode="json"),
            "model": str(self.model),
            "seed": self.settings.seed,
            "data": str(self.data),
            "data_sha256": self.conversations.fingerprint,
            "processes": self.arguments.world_size,
        }
        save_result(
            trainer.accelerator.unwrap_model(trainer.model),
            self.processor,
            self.output,
            self.work,
            recipe=self.recipe,
            summary=summary,
            weights=weights,
            merge_lora=merge_lora,
        )
