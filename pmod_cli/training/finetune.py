"""A whole fine-tuning run: check, load, freeze, train, and put an ordinary checkpoint in place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from pmod_cli.checkpoints.write import check_space
from pmod_cli.data.bad_samples import BadSampleLog
from pmod_cli.data.collate import Collator, EncodedDataset, longest_sample
from pmod_cli.data.dataset import ConversationData, open_data
from pmod_cli.data.sampler import OrderedSampler
from pmod_cli.devices import world_size
from pmod_cli.generation import check_source
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import Recipe, TrainSettings
from pmod_cli.training import preflight
from pmod_cli.training.arguments import training_arguments
from pmod_cli.training.finish import METRICS, gathered_weights, save_result
from pmod_cli.training.loading import load_for_training
from pmod_cli.training.memory import MemoryEstimate, describe, device_memory, estimate
from pmod_cli.training.monitor import Monitor, ProgressCallback, read_metrics
from pmod_cli.training.parts import PartCount, count_parts
from pmod_cli.training.probe import make_probe
from pmod_cli.training.signals import Preempted, StopAtSignal
from pmod_cli.training.trainer import (
    KEPT_CHECKPOINTS,
    STAGING,
    PmodTrainer,
    checkpoint_bytes,
    last_checkpoint,
    peak_memory,
)
from pmod_cli.training.warmup import RatioWarmup

BAD_SAMPLES = "bad_samples.jsonl"

Announce = Callable[[list[PartCount], MemoryEstimate], None]
"""Called once before the first step, with what is trained and what it will take."""


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
        force: Replace ``output``, and start anew what was begun.
        progress: See `ProgressCallback`.
        announce: See `Announce`.
        merge_lora: Fold LoRA into the weights at the end; without it a LoRA run's output is a PEFT adapter.

    Raises:
        PmodError: Whatever of the input is wrong, before training starts wherever it can be known.
        GateError: A loss or gradient that is not finite; too many bad samples.
        Preempted: SIGTERM came, and a checkpoint was saved.
    """
    settings = recipe.train
    check_source(model)
    preflight.check_family(model, recipe)
    preflight.check_extras(settings)
    if merge_lora and settings.lora is None:
        raise PmodError("--merge is for LoRA, and the recipe has no train.lora")
    output = output.resolve()
    work = output.with_name(output.name + ".training")
    _check_places(output, work, resume=resume, force=force)
    conversations = ConversationData(open_data(data, images))
    preflight.check_data_fits(conversations, settings.max_bad_samples)
    schedule = preflight.plan_steps(settings, len(conversations), world_size())
    arguments = training_arguments(settings, work, schedule)

    checkpoint = last_checkpoint(work) if resume else None
    identity = preflight.identify(recipe, model, conversations.fingerprint)
    if arguments.process_index == 0:
        _open_work(work, identity, anew=force and not resume, resuming=checkpoint is not None)
    _wait_for_all()

    set_seed(settings.seed)  # the Trainer does it too, but LoRA is drawn before
    # The Trainer itself loads a LoRA adapter into the wrapped model, and shards into theirs.
    whole = checkpoint is not None and settings.lora is None and preflight.sharding() is None
    network, processor = load_for_training(checkpoint if checkpoint and whole else model, settings)
    dataset = EncodedDataset(conversations, conversations.pictures, processor, settings.max_length)
    parts = count_parts(network)
    copies = 1 if checkpoint else min(KEPT_CHECKPOINTS + 1, -(-schedule.steps // settings.save_steps))
    check_space(work, copies * checkpoint_bytes(parts, adapter_only=settings.lora is not None))
    subject = describe(network, *longest_sample(dataset))
    shards = preflight.sharding()
    memory = estimate(subject, settings, arguments.world_size, shards, device_memory())
    if announce is not None and arguments.process_index == 0:
        announce(parts, memory)

    bad = BadSampleLog(work / BAD_SAMPLES, settings.max_bad_samples, conversations.bad)
    trainer, stopper = _build(
        network, processor, dataset, arguments, settings, work, bad, progress, weights_loaded=whole
    )
    began = time.perf_counter()
    with stopper.listening():
        _train(trainer, checkpoint, memory)
    seconds = time.perf_counter() - began
    if stopper.asked and trainer.state.global_step < schedule.steps:
        raise Preempted(
            f"stopped by SIGTERM after step {trainer.state.global_step}; a checkpoint is saved in {work}",
            "go on with --resume",
        )

    losses = [row["loss"] for row in read_metrics(work / METRICS) if "loss" in row]
    result = FinetuneResult(
        output=str(output),
        steps=trainer.state.global_step,
        resumed_from=int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        samples=len(conversations),
        bad_samples=bad.all(),
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        seconds=seconds,
        parts=parts,
        memory=memory.to_dict(),
        peak_memory_bytes=peak_memory(),
    )
    weights = gathered_weights(trainer)
    if arguments.process_index == 0:
        summary = {
            "result": result.to_dict(),
            "recipe": recipe.model_dump(mode="json"),
            "model": str(model),
            "seed": settings.seed,
            "data": str(data),
            "data_sha256": conversations.fingerprint,
            "processes": arguments.world_size,
        }
        network = trainer.accelerator.unwrap_model(trainer.model)
        save_result(
            network,
            processor,
            output,
            work,
            recipe=recipe,
            summary=summary,
            weights=weights,
            merge_lora=merge_lora,
        )
    return result


def _check_places(output: Path, work: Path, *, resume: bool, force: bool) -> None:
    if output.exists() and not force:
        raise PmodError(f"{output} exists", "--force replaces it")
    if output.is_file():
        raise PmodError(f"{output} is a file, not a folder")
    if last_checkpoint(work) is not None and not (resume or force):
        raise PmodError(f"{work} holds an unfinished run", "--resume goes on with it, --force starts anew")


def _open_work(work: Path, identity: dict[str, Any], *, anew: bool, resuming: bool) -> None:
    try:
        if anew:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work / STAGING, ignore_errors=True)  # a checkpoint that a kill cut off
        preflight.check_identity(work / "run.json", identity, resuming=resuming)
    except OSError as error:
        raise PmodError(f"cannot write {work}: {error.strerror}", "choose another --output") from error


def _wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _build(
    network: Any,
    processor: Any,
    dataset: EncodedDataset,
    arguments: Any,
    settings: TrainSettings,
    work: Path,
    bad: BadSampleLog,
    progress: ProgressCallback | None,
    *,
    weights_loaded: bool,
) -> tuple[PmodTrainer, StopAtSignal]:
    """The Trainer with all that watches it."""
    collator = Collator(processor, image_for_text=arguments.world_size > 1)
    # Where the model lies in pieces on all processes, all have to take part in a look at the routers.
    looks = preflight.sharding() is not None or arguments.process_index == 0
    probe = make_probe(network, dataset, collator, settings.micro_batch_size) if looks else []
    monitor = Monitor(work / METRICS, progress, probe, settings.router_stats_steps)
    stopper = StopAtSignal()
    callbacks = [monitor, stopper]
    if settings.ratio_warmup_steps:
        callbacks.append(RatioWarmup(network, settings.ratio_warmup_steps))
    group = settings.global_batch_size if settings.group_by_modality_length else None
    trainer = PmodTrainer(
        model=network,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        sampler=OrderedSampler(dataset.samples, settings.seed, group),
        bad=bad,
        router_learning_rate=settings.router_learning_rate,
        weights_loaded=weights_loaded,
        callbacks=callbacks,
    )
    monitor.trainer = trainer
    # The monitor shows the progress; the Trainer's own callback prints dicts to stdout.
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = _layer_classes(network)
    return trainer, stopper


def _layer_classes(network: torch.nn.Module) -> list[str]:
    """Class names of the layers that FSDP shards one by one: the decoder's, dense or not, and the tower's."""
    lists = [module for module in network.modules() if isinstance(module, torch.nn.ModuleList)]
    return sorted(
        {type(layer).__name__ for layers in lists for layer in layers if "Layer" in type(layer).__name__}
    )


def _train(trainer: PmodTrainer, checkpoint: Path | None, memory: MemoryEstimate) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise PmodError(
            f"step {trainer.state.global_step + 1}: out of memory on the GPU",
            "; ".join(memory.advice) or "lower train.micro_batch_size, and go on with --resume",
        ) from error
