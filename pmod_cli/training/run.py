"""A whole fine-tuning run: check, load, freeze, train, and put an ordinary checkpoint in place."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from pmod_cli import __version__
from pmod_cli.chat_templates import VICUNA_V1
from pmod_cli.errors import PmodError
from pmod_cli.generation import VisionLanguageModel, check_source
from pmod_cli.recipe import Recipe, TrainSettings
from pmod_cli.training.aspect import apply_aspect
from pmod_cli.training.collate import Collator, EncodedDataset
from pmod_cli.training.dataset import BadSample, ConversationData, image_path
from pmod_cli.training.lora import add_lora, merge
from pmod_cli.training.monitor import Monitor, ProgressCallback, read_metrics
from pmod_cli.training.parts import PartCount, count_parts, freeze
from pmod_cli.training.sampler import OrderedSampler
from pmod_cli.training.trainer import PmodTrainer, last_checkpoint
from pmod_cli.training.warmup import RatioWarmup

SUMMARY = "training.json"
METRICS = "metrics.jsonl"
_PROBE_SAMPLES = 8


class Preempted(PmodError):
    """SIGTERM came; a checkpoint was saved. Exit code 143, as the shell has it for SIGTERM."""

    exit_code = 143


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
    """

    output: str
    steps: int
    resumed_from: int | None
    samples: int
    bad_samples: dict[str, str]
    first_loss: float
    final_loss: float
    seconds: float
    parts: list[PartCount]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can write."""
        return asdict(self)


def finetune(
    model: str | Path,
    data: Path,
    images: Path,
    output: Path,
    *,
    recipe: Recipe,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
    announce_parts: Callable[[list[PartCount]], None] | None = None,
    merge_lora: bool = False,
) -> FinetuneResult:
    """Fine-tune a dense or p-MoD checkpoint on LLaVA data.

    While it runs, everything lies in ``OUTPUT.training`` (checkpoints, ``metrics.jsonl``); ``output`` appears
    only when it is complete.

    Args:
        model: Checkpoint folder or hub id.
        data: LLaVA JSON or JSONL.
        images: The folder that its image names are relative to.
        output: The new checkpoint.
        recipe: Its ``train`` section is followed.
        resume: Go on from the last complete checkpoint, if there is one.
        force: Replace ``output``, and start anew what was begun.
        progress: See `ProgressCallback`.
        announce_parts: Called once, before the first step, with the list of `PartCount`.
        merge_lora: Fold LoRA into the weights at the end; without it a LoRA run's output is a PEFT adapter.

    Raises:
        PmodError: Whatever of the input is wrong, before training starts wherever it can be known.
        GateError: A loss or gradient that is not finite; too many bad samples.
        Preempted: SIGTERM came, and a checkpoint was saved.
    """
    settings = recipe.train
    check_source(model)
    if merge_lora and settings.lora is None:
        raise PmodError("--merge is for LoRA, and the recipe has no train.lora")
    output = output.resolve()
    work = output.with_name(output.name + ".training")
    _check_places(output, work, resume=resume, force=force)
    conversations = ConversationData(data, images)
    missing = _missing_images(conversations)
    if len(missing) > settings.max_bad_samples:
        name, reason = next(iter(missing.items()))
        raise PmodError(
            f"{len(missing)} samples lack an image (train.max_bad_samples is {settings.max_bad_samples}); "
            f"the first: {name}: {reason}",
            "see pmod data check",
        )
    arguments = _arguments(settings, work, len(conversations))

    identity = {
        "data": conversations.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "model": str(model),
    }
    checkpoint = last_checkpoint(work) if resume else None
    if arguments.process_index == 0:
        if force and not resume:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        _check_identity(work, identity, resuming=checkpoint is not None)
    _wait_for_all()

    # The Trainer itself loads a LoRA adapter into the wrapped model, and shards into theirs.
    whole = checkpoint is not None and settings.lora is None and not _sharded()
    source = checkpoint if checkpoint is not None and whole else model
    network, processor = _load(source, settings)
    if settings.gradient_checkpointing:
        _enable_checkpointing(network)
    parts = count_parts(network)
    if announce_parts is not None and arguments.should_save:
        announce_parts(parts)

    dataset = EncodedDataset(conversations, images, processor, settings.max_length)
    collator = Collator(processor, image_for_text=arguments.world_size > 1)
    group = settings.global_batch_size if settings.group_by_modality_length else None
    monitor = Monitor(
        work / METRICS, progress, _probe(network, dataset, collator), settings.router_stats_steps
    )
    trainer = PmodTrainer(
        model=network,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        sampler=OrderedSampler(conversations, settings.seed, group),
        router_learning_rate=settings.router_learning_rate,
        max_bad_samples=settings.max_bad_samples,
        weights_loaded=whole,
        callbacks=[monitor],
    )
    monitor.trainer = trainer
    _quiet(trainer)
    if settings.ratio_warmup_steps:
        trainer.add_callback(RatioWarmup(network, settings.ratio_warmup_steps))
    stopper = _StopAtSignal()
    trainer.add_callback(stopper)
    began = time.perf_counter()
    with stopper.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - began
    if stopper.asked:
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
        bad_samples={**dict(conversations.bad), **trainer.bad_samples},
        first_loss=losses[0] if losses else math.nan,
        final_loss=losses[-1] if losses else math.nan,
        seconds=seconds,
        parts=parts,
    )
    _save(trainer, processor, output, work, recipe, result, identity, merge_lora)
    return result


def _load(model: str | Path, settings: TrainSettings) -> tuple[Any, Any]:
    """The model, frozen where it is, and its processor, both as the recipe wants them."""
    # Weights that are trained need float32: bfloat16 would round small updates away.
    dtype = "float32" if settings.lora is None else settings.dtype
    loaded = VisionLanguageModel.load(
        model, dtype=dtype, device="cpu", attn_implementation=settings.attn_implementation
    )
    network: Any = loaded.model
    processor = apply_aspect(network, loaded.processor, settings.image_aspect_ratio)
    if settings.chat_template == "vicuna_v1":
        processor.chat_template = VICUNA_V1
    if settings.lora is not None:
        return add_lora(network, settings.lora), processor
    freeze(network, vision_tower=settings.freeze_vision_tower)
    return network, processor


def _sharded() -> bool:
    """Whether accelerate was told to shard the model over processes."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "").lower() in ("1", "true") for name in names)


def _wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _enable_checkpointing(network: Any) -> None:
    # Renamed in transformers 5.24.
    enable = (
        getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def _check_places(output: Path, work: Path, *, resume: bool, force: bool) -> None:
    if output.exists() and not force:
        raise PmodError(f"{output} exists", "--force replaces it")
    if output.is_file():
        raise PmodError(f"{output} is a file, not a folder")
    if last_checkpoint(work) is not None and not (resume or force):
        raise PmodError(f"{work} holds an unfinished run", "--resume goes on with it, --force starts anew")


def _missing_images(data: ConversationData) -> dict[str, str]:
    """The quick part of the data check: samples whose image file does not exist, or may not be opened."""
    missing = {}
    for sample in data.samples:
        for name in sample.images:
            try:
                if not image_path(data.images, name).is_file():
                    missing[sample.id] = f"missing image: {name}"
            except BadSample as error:
                missing[sample.id] = str(error)
    return missing


def _check_identity(work: Path, identity: dict[str, Any], *, resuming: bool) -> None:
    """Refuse to resume with other data, another recipe or another model."""
    path = work / "run.json"
    if resuming and path.exists():
        before = json.loads(path.read_text())
        changed = [key for key, value in identity.items() if before.get(key) != value]
        if changed:
            raise PmodError(
                f"cannot resume {work}: the {' and the '.join(changed)} changed since it was begun",
                "--force (without --resume) starts anew",
            )
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(identity, indent=2))
    temporary.replace(path)


def _arguments(settings: TrainSettings, work: Path, samples: int) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if _sharded() and world > 1 and not torch.cuda.is_available():
        # Tried: on the CPU the Trainer silently runs DDP when FSDP is asked for.
        raise PmodError("FSDP and DeepSpeed need a GPU here", "on the CPU, run torchrun without them: DDP")
    accumulation, remainder = divmod(settings.global_batch_size, settings.micro_batch_size * world)
    if remainder or not accumulation:
        raise PmodError(
            f"train.global_batch_size={settings.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={settings.micro_batch_size} times {world} processes"
        )
    steps = settings.max_steps
    if steps <= 0:
        steps = max(1, math.ceil(math.ceil(samples / settings.global_batch_size) * settings.epochs))
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=math.ceil(steps * settings.warmup_ratio),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta2=settings.adam_beta2,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16" and on_gpu,
        # Worker processes cost more than they bring where the model itself runs on the CPU.
        dataloader_num_workers=settings.num_workers if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=list(settings.report_to) or "none",
        seed=settings.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        use_cpu=not on_gpu,
    )


def _probe(model: nn.Module, dataset: EncodedDataset, collator: Collator) -> dict[str, Any] | None:
    """A fixed batch with images on which to watch the routers; None for a dense model or text-only data."""
    if not any(".router." in name for name, _ in model.named_parameters()):
        return None
    chosen = [index for index, sample in enumerate(dataset.samples) if sample.images][:_PROBE_SAMPLES]
    if not chosen:
        return None
    batch = collator([dataset[index] for index in chosen])
    return {key: value for key, value in batch.items() if key not in ("labels", "sample_ids", "replaced")}


def _quiet(trainer: PmodTrainer) -> None:
    """The monitor shows the progress; the Trainer's own callback prints dicts to stdout."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class _StopAtSignal(TrainerCallback):
    """SIGTERM (preemption): finish the step, save, stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        def ask(number: int, frame: Any) -> None:
            self.asked = True

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread: whoever started it gets the signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


def _save(
    trainer: PmodTrainer,
    processor: Any,
    output: Path,
    work: Path,
    recipe: Recipe,
    result: FinetuneResult,
    identity: dict[str, Any],
    merge_lora: bool,
) -> None:
    """Write the checkpoint beside its place and move it there."""
    trainer.accelerator.wait_for_everyone()
    network = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.args.should_save:
        return
    if merge_lora:
        network = merge(network)
    network.to(getattr(torch, recipe.train.dtype))
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.copy(work / METRICS, temporary / METRICS)
    summary = {
        "result": result.to_dict(),
        "recipe": recipe.model_dump(mode="json"),
        "model": identity["model"],
        "data_sha256": identity["data"],
        "processes": trainer.args.world_size,
        "versions": _versions(),
    }
    (temporary / SUMMARY).write_text(json.dumps(summary, indent=2))
    if output.exists():
        old = output.with_name(f".{output.name}.old.{os.getpid()}")
        output.replace(old)
        temporary.replace(output)
        shutil.rmtree(old)
    else:
        temporary.replace(output)
    shutil.rmtree(work)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate")
    return {
        "pmod": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
