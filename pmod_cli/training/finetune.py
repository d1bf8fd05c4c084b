"""A whole fine-tuning run: settings, preflight, data, model, Trainer, result."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from pmod_cli.checkpoints.write import check_space
from pmod_cli.data.batches import Collator, EncodedDataset, OrderedSampler, longest_sample
from pmod_cli.data.dataset import open_data
from pmod_cli.devices import world_size
from pmod_cli.output.errors import GateError, PmodError, first_line
from pmod_cli.output.files import folders_above, locked, open_folder, remove_folder
from pmod_cli.output.marks import MARKER
from pmod_cli.output.paths import public_name, user_path
from pmod_cli.recipe import Recipe
from pmod_cli.training import preflight
from pmod_cli.training.callbacks import Preempted, RatioWarmup, StopAtSignal
from pmod_cli.training.finish import METRICS, save_result
from pmod_cli.training.memory import describe, device_memory, estimate, frozen_bytes
from pmod_cli.training.model import check_parts, count_parts, load_for_training
from pmod_cli.training.monitor import BadSampleLog, Monitor, ProgressCallback, make_probe, read_metrics
from pmod_cli.training.trainer import (
    KEPT_CHECKPOINTS,
    STAGING,
    PmodTrainer,
    check_complete,
    checkpoint_bytes,
    checkpoint_step,
    last_checkpoint,
    peak_memory,
)

Announce = Callable[[list[dict[str, Any]], dict[str, Any]], None]
"""Called once before the first step, with what is trained (`count_parts`) and the memory it will take (`estimate`)."""


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
) -> dict[str, Any]:
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

    Returns:
        What ``docs/json.md`` lists for ``pmod finetune --json``.

    Raises:
        PmodError: The input is wrong: found before training starts wherever that is possible.
        GateError: A loss or gradient that is not finite; too many bad samples.
        Preempted: SIGTERM came, and a checkpoint was saved.
    """
    if merge_lora and recipe.train.lora is None:
        raise PmodError("--merge is for LoRA, and the recipe has no train.lora")
    run = _Run(model, data, images, output, recipe, resume=resume, force=force)
    with run.open_folder(anew=force and not resume):
        set_seed(recipe.train.seed)  # the Trainer does it too, but LoRA's weights are drawn before
        run.load()
        if announce is not None and run.main:
            announce(run.parts, run.memory)
        trainer = run.make_trainer(progress)
        seconds = run.train(trainer)
        return run.finish(trainer, seconds, merge_lora)


class _Run:
    """The steps of a run, in the order of the methods; to make it checks all that can be checked without the model."""

    def __init__(
        self,
        model: str | Path,
        data: str | Path,
        images: Path | None,
        output: Path,
        recipe: Recipe,
        *,
        resume: bool,
        force: bool,
    ) -> None:
        self.model, self.data, self.recipe, self.settings = model, data, recipe, recipe.train
        self.force = force
        self.output = Path(os.path.abspath(user_path(output)))  # noqa: PTH100 - a link is refused, not followed
        if not self.output.name:
            raise PmodError(f"{self.output} is no place for a checkpoint", "choose another place")
        self.work = self.output.with_name(self.output.name + ".training")
        self.checkpoint = last_checkpoint(self.work) if resume else None
        self.shards = preflight.sharding()
        # LoRA adapters and shards are no ordinary checkpoints: the Trainer itself loads them into the wrapped model.
        self.loads_checkpoint = self.checkpoint is not None and recipe.train.lora is None and not self.shards
        preflight.check_model(model, recipe)
        inputs = [model, data, *([images] if images else [])]
        preflight.check_output(self.output, self.work, inputs, resume=resume, force=force)
        self.conversations = open_data(data, images)
        preflight.check_data_fits(self.conversations, self.settings.max_bad_samples)
        self.steps, accumulation = preflight.plan_steps(
            self.settings, len(self.conversations.samples), world_size()
        )
        self.arguments = preflight.training_arguments(self.settings, self.work, self.steps, accumulation)
        self.main = self.arguments.process_index == 0

    @contextlib.contextmanager
    def open_folder(self, *, anew: bool) -> Iterator[None]:
        """Make the training folder, or check that it is of the same run, and keep others out; other processes wait.

        A run that breaks off before its first checkpoint leaves none, but where a limit was not met: what it logged
        tells why.
        """
        with contextlib.ExitStack() as stack:
            try:
                if self.main:
                    stack.enter_context(folders_above(self.work))
                    open_folder(self.work, preflight.HOLDS)
                    stack.enter_context(locked(self.work, self.output))
                    stack.enter_context(self._unused())
                    for path in self.work.iterdir():
                        if path.name == STAGING or (
                            anew and path.name != MARKER
                        ):  # STAGING: a kill cut it off
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                    digest, resuming = self.conversations.fingerprint, self.checkpoint is not None
                    preflight.check_identity(self.work, self.recipe, self.model, digest, resuming)
                    if self.checkpoint is not None and not self.shards:
                        check_complete(self.checkpoint)
            except OSError as error:
                raise PmodError(
                    f"cannot write {self.work}: {error.strerror}", "choose another --output"
                ) from error
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()
            yield

    @contextlib.contextmanager
    def _unused(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not isinstance(error, GateError) and last_checkpoint(self.work) is None:
                with contextlib.suppress(PmodError):
                    remove_folder(self.work)
            raise

    def load(self) -> None:
        """Load model and processor; check that the disk takes the checkpoints; estimate the memory."""
        settings, data = self.settings, self.conversations
        source = self.checkpoint if self.checkpoint and self.loads_checkpoint else self.model
        self.network, self.processor = load_for_training(source, settings)
        check_parts(self.network, settings)
        self.dataset = EncodedDataset(
            data.samples, data.pictures, self.processor, settings.max_length, settings.image_position
        )
        self.parts = count_parts(self.network)
        copies = 1 if self.checkpoint else min(KEPT_CHECKPOINTS + 1, -(-self.steps // settings.save_steps))
        size = checkpoint_bytes(
            self.parts, adapter_only=settings.lora is not None, frozen_size=frozen_bytes(settings)
        )
        check_space(self.work, copies * size)
        workload = describe(self.network, *longest_sample(self.dataset))
        self.memory = estimate(workload, settings, self.arguments.world_size, self.shards, device_memory())

    def make_trainer(self, progress: ProgressCallback | None) -> PmodTrainer:
        """The Trainer with its callbacks."""
        settings, network, dataset = self.settings, self.network, self.dataset
        whole = network.get_base_model() if settings.lora is not None else network
        collator = Collator(
            self.processor,
            image_for_text=self.arguments.world_size > 1,
            logits_to_keep="logits_to_keep" in inspect.signature(whole.forward).parameters,
        )
        # Where the model lies in pieces on all processes, all have to take part in a look at the routers.
        looks = self.shards is not None or self.main
        probe = make_probe(network, dataset, collator, settings.micro_batch_size) if looks else []
        monitor = Monitor(self.work / METRICS, progress, probe, settings.router_stats_steps)
        warmup = settings.ratio_warmup_steps
        group = settings.global_batch_size if settings.group_by_modality_length else None
        bad = BadSampleLog(self.work / "bad_samples.jsonl", settings.max_bad_samples, self.conversations.bad)
        trainer = PmodTrainer(
            model=network,
            args=self.arguments,
            train_dataset=dataset,
            data_collator=collator,
            processing_class=self.processor,
            sampler=OrderedSampler(dataset.samples, settings.seed, group),
            bad=bad,
            router_learning_rate=settings.router_learning_rate,
            weights_loaded=self.loads_checkpoint,
            distill=settings.distill,
            callbacks=[monitor, *([RatioWarmup(network, warmup)] if warmup else [])],
        )
        monitor.trainer = trainer
        return trainer

    def train(self, trainer: PmodTrainer) -> float:
        """Train, and give the seconds it took; `Preempted` if SIGTERM came before the last step."""
        began = time.perf_counter()
        stopper = StopAtSignal()
        trainer.add_callback(stopper)
        try:
            with stopper.listening():
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise PmodError(
                f"step {trainer.state.global_step + 1}: out of memory on the GPU",
                "; ".join(self.memory["advice"]) or "lower train.micro_batch_size, and go on with --resume",
            ) from error
        except (TypeError, ValueError, LookupError) as error:
            raise PmodError(
                f"step {trainer.state.global_step + 1}: the model, its processor and the data do not fit: "
                f"{first_line(error)}"
            ) from error
        step = trainer.state.global_step
        if stopper.asked and step < self.steps:
            raise Preempted(
                f"stopped by SIGTERM after step {step}; a checkpoint is saved in {self.work}",
                "go on with --resume",
            )
        return time.perf_counter() - began

    def finish(self, trainer: PmodTrainer, seconds: float, merge_lora: bool) -> dict[str, Any]:
        """Put the finished checkpoint in its place, and tell what the run did; all processes must call it."""
        losses = [row["loss"] for row in read_metrics(self.work / METRICS) if "loss" in row]
        result = {
            "output": str(self.output),
            "steps": trainer.state.global_step,
            "resumed_from": checkpoint_step(self.checkpoint) if self.checkpoint else None,
            "samples": len(self.conversations.samples),
            "bad_samples": trainer.bad.all(),
            "first_loss": losses[0] if losses else None,
            "final_loss": losses[-1] if losses else None,
            "seconds": seconds,
            "parts": self.parts,
            "memory": self.memory,
            "peak_memory_bytes": peak_memory(),
        }
        network = trainer.whole_network()
        if self.main:
            summary = {
                "result": result | {"output": self.output.name},
                "recipe": self.recipe.model_dump(mode="json"),
                "model": public_name(self.model),
                "seed": self.settings.seed,
                "data": public_name(self.data),
                "data_sha256": self.conversations.fingerprint,
                "processes": self.arguments.world_size,
            }
            save_result(
                network,
                self.processor,
                self.output,
                self.work,
                recipe=self.recipe,
                summary=summary,
                merge_lora=merge_lora,
                force=self.force,
            )
        return result
