"""transformers' Trainer with our order of samples, checkpoints that are complete or absent, and a stop at NaN.

Everything of transformers and accelerate that is private, or changed behind their backs, stands in this file. It holds
for transformers 5.17 to 5.x and accelerate 1.10 to 1.x; `tests/training/test_patches.py` fails when upstream moves it:

- ``Trainer._get_train_sampler``: our order; there is no argument for a sampler.
- ``Trainer._run_epoch``: a run that was killed after its last step must not take one more.
- ``Trainer._get_grad_norm``: called once per optimizer step, just before it: a loss or gradient that is not finite must
  not reach the weights. ``on_pre_optimizer_step`` does not get the norm.
- ``Trainer._load_from_checkpoint``: it takes the file's names as they are, with ``strict=False``. A LLaVA's file has
  other names than the model (``language_model.model...``), so it would silently go on from the initial weights.
- ``Trainer._load_optimizer_and_scheduler`` and ``_load_rng_state``: what they raise over a damaged file is of any kind.
- ``Trainer._get_output_dir`` and ``_save_checkpoint``: a checkpoint is written aside and renamed into place.
- ``fsdp_plugin.transformer_cls_names_to_wrap``: a p-MoD model has decoder layers of two classes, and the launcher's
  config file cannot know which.
- ``fsdp_plugin.mixed_precision_policy``: accelerate has FSDP2 round a module's output, the loss among it, to bfloat16.
- The classes ``FSDP...`` that FSDP2 makes of a module's: they cannot be cast once their weights are gathered.
- ``_weight_conversions``: under ZeRO-3 transformers keeps rules that renamed nothing while loading, too, and would undo
  them when it saves.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, TrainerState

from pmod_cli.data.batches import OrderedSampler
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import GateError, PmodError, first_line, told_as
from pmod_cli.output.reading import read_json
from pmod_cli.training.distill import answer_logprobs, divergence, teacher_logprobs
from pmod_cli.training.monitor import BadSampleLog

STAGING = "saving"
"""Folder, beside the checkpoints, in which the next one is written before it is renamed into place."""
KEPT_CHECKPOINTS = 2
_REMOVE = "remove it, and --resume goes on from the one before"


class PmodTrainer(Trainer):
    """The Trainer, with the changes that the module lists.

    ``weights_loaded`` says that the model already has the weights of the checkpoint that is resumed from; with
    ``distill`` the loss is the divergence from the dense model.
    """

    def __init__(
        self,
        *,
        sampler: OrderedSampler,
        bad: BadSampleLog,
        router_learning_rate: float | None = None,
        weights_loaded: bool = False,
        distill: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(compute_loss_func=self._divergence if distill else None, **kwargs)
        self.sampler, self.bad = sampler, bad
        self.router_learning_rate = router_learning_rate
        self.weights_loaded, self.distill = weights_loaded, distill
        self._step_ids: list[str] = []
        self._step_losses: list[Tensor] = []
        self._samples = self._tokens = 0
        self._since = time.perf_counter()
        # The monitor shows the progress; the Trainer's own callback prints dicts to stdout.
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = _layer_classes(self.model)
            if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        if self.is_deepspeed_enabled:
            for module in self.model.modules():
                if rules := vars(module).get("_weight_conversions"):
                    module._weight_conversions = [rule for rule in rules if rule.was_used()]

    def whole_network(self) -> Any:
        """The trained model, or the PEFT model around it; on the main process without shards, for saving alone.

        All processes must call it.
        """
        self.accelerator.wait_for_everyone()
        network = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
            if self.args.should_save:
                _undo_sharding(network, weights)
        return network

    def _get_train_sampler(self, train_dataset: Any = None) -> OrderedSampler:
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the routers in a group of their own where they have their own rate."""
        optimizer = super().create_optimizer(model)
        if self.router_learning_rate is not None:
            _split_group(self.model if model is None else model, optimizer, self.router_learning_rate)
        return optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Killed between the last step and the result: transformers would take one step more.
        if self.state.global_step >= self.args.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro batch; `GateError` if there are too many bad samples."""
        notes = inputs.pop("notes")
        self._step_ids += notes["ids"]
        self._samples += len(notes["ids"])
        self._tokens += notes["tokens"]
        self.bad.add(notes["replaced"])
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append(loss.detach())
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, after the dense model's turn where that is learned from."""
        if self.distill:
            self._teacher = teacher_logprobs(model, self.accelerator.unwrap_model(model), inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _divergence(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        return divergence(self._teacher, answer_logprobs(outputs.logits, labels), num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, just before the optimizer steps; `GateError` if it or a loss is not finite.

        This is the one place that waits for the device.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        losses = torch.stack(self._step_losses).tolist()
        wrong = next((loss for loss in losses if not math.isfinite(loss)), None)
        if wrong is not None:
            raise self._not_finite(f"the loss is {wrong}")
        # In float16 the loss scaler skips such a step, and tries with a smaller scale.
        scaler = getattr(self.accelerator, "scaler", None)
        retried = scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1
        if norm is not None and not math.isfinite(float(norm)) and not retried:
            raise self._not_finite(f"the gradient norm is {float(norm)}")
        self._step_ids.clear()
        self._step_losses.clear()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed and memory to what the Trainer logs."""
        if "loss" in logs:
            now = time.perf_counter()
            seconds = max(now - self._since, 1e-9)
            logs["samples_per_second"] = self._samples * self.args.world_size / seconds
            logs["tokens_per_second"] = self._tokens * self.args.world_size / seconds
            logs["memory_bytes"] = float(peak_memory())
            self._since, self._samples, self._tokens = now, 0, 0
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.weights_loaded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with told_as(f"cannot resume from {checkpoint}", _REMOVE):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with told_as(f"cannot resume from {checkpoint}", _REMOVE):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it there: it is complete or absent."""
        work = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        what = f"step {self.state.global_step}: cannot write a checkpoint in {work}"
        with writing(what, f"make room there{' and go on with --resume' if last_checkpoint(work) else ''}"):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (work / STAGING / name).replace(work / name)
            for old in checkpoints(work)[:-KEPT_CHECKPOINTS]:
                # Out of sight first: what is half deleted must not look complete.
                gone = work / STAGING / old.name
                old.replace(gone)
                shutil.rmtree(gone)

    def _not_finite(self, what: str) -> PmodError:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"last good checkpoint: {last}" if last else "no checkpoint yet"
        return GateError(
            f"step {self.state.global_step + 1}: {what}; samples {', '.join(self._step_ids)}; {kept}",
            "lower train.learning_rate, or use train.dtype=bfloat16 or float32",
        )


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training folder, by step."""
    found = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]{1,18}", path.name)
    ]
    return sorted(found, key=checkpoint_step)


def check_complete(checkpoint: Path) -> None:
    """Refuse a checkpoint of another step, with an odd state, or without a file that the Trainer goes on without."""
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise PmodError(f"cannot resume from {checkpoint}: it has no {name}", _REMOVE)
    state = read_json(checkpoint / "trainer_state.json")
    for key, fresh in asdict(TrainerState()).items():
        value = state.get(key, fresh)
        kinds: Any = {int: (int, float), float: (int, float)}.get(type(fresh), type(fresh))
        if key == "train_batch_size":  # None in a fresh state, as are others that pmod's runs have no use for
            kinds = (int, type(None))
        if not isinstance(value, kinds):
            raise PmodError(
                f"cannot resume from {checkpoint}: {key} in its trainer_state.json is {value!r:.40}", _REMOVE
            )
    if state.get("global_step") != checkpoint_step(checkpoint):
        raise PmodError(
            f"cannot resume from {checkpoint}: its trainer_state.json is of another step", _REMOVE
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a training folder."""
    return next(reversed(checkpoints(folder)), None)


def checkpoint_bytes(parts: Sequence[dict[str, Any]], *, adapter_only: bool, frozen_size: int = 4) -> int:
    """Size of a checkpoint: float32 weights (with LoRA, of what is trained) and Adam's two moments.

    A frozen weight takes ``frozen_size`` bytes.
    """
    trained, frozen = (sum(part[kind] for part in parts) for kind in ("trained", "frozen"))
    return 12 * trained + (0 if adapter_only else frozen_size * frozen)


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes: the GPU's, or the machine's without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def writing(message: str, hint: str) -> Iterator[None]:
    """Make a `PmodError` of what says that a file cannot be written; torch and safetensors have errors of their own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif any(word in str(error) for word in ("PytorchStreamWriter", "inline_container")):
            reason = "the disk took only a part of it"
        elif any(word in str(error) for word in ("I/O error", "IoError", "No space left")):
            reason = first_line(error)
        else:
            raise
        raise PmodError(f"{message}: {reason}", hint) from error


def _layer_classes(network: nn.Module) -> list[str]:
    """Class names of the layers that FSDP shards one by one: the decoder's, dense or not, and the tower's."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    names = {type(layer).__name__ for layers in lists for layer in layers}
    return sorted(name for name in names if "Layer" in name)


def _undo_sharding(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Make ordinary modules of sharded ones, with the parameters of a whole state dict; what was tied stays tied."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]  # FSDP2 had put a class of its own before it
    whole: dict[int, nn.Parameter] = {}
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        shard = getattr(module, leaf)
        if isinstance(shard, nn.Parameter):
            parameter = whole.setdefault(id(shard), nn.Parameter(weight, shard.requires_grad))
            module.register_parameter(leaf, parameter)


def _split_group(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Move the routers of each parameter group into one of their own, with their own learning rate."""
    routers = {id(p) for name, p in model.named_parameters() if is_router(name) and p.requires_grad}
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if id(p) in routers]
        if ours:
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
            optimizer.add_param_group({**settings, "params": ours, "lr": rate})
