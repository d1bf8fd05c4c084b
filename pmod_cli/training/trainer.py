"""transformers' Trainer with our order of samples, a learning rate for routers, and a stop at the first NaN."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from pmod_cli.errors import GateError, PmodError
from pmod_cli.training.sampler import OrderedSampler

ROUTER = re.compile(r"(^|\.)router\.")
COMPLETE = "complete"
"""Name of the empty file that a checkpoint gets last: one without it was cut off and is ignored."""


class PmodTrainer(Trainer):
    """See the module.

    Args:
        sampler: The order of the samples.
        router_learning_rate: For the routers; the others' if None.
        max_bad_samples: More replaced samples than this stop the run.
        weights_loaded: The model already has the weights of the checkpoint that is resumed from. The Trainer
            would load the file's names as they are, with ``strict=False``; a LLaVA's file has other names than
            the model (``language_model.model...``), so it would silently go on from the initial weights.
        **kwargs: The Trainer's.
    """

    def __init__(
        self,
        *,
        sampler: OrderedSampler,
        router_learning_rate: float | None,
        max_bad_samples: int,
        weights_loaded: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sampler = sampler
        self.router_learning_rate = router_learning_rate
        self.max_bad_samples = max_bad_samples
        self.weights_loaded = weights_loaded
        self.bad_samples: dict[str, str] = {}
        self.recent_ids: list[str] = []
        self.tokens = 0
        self.samples = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> OrderedSampler:
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the routers in a group of their own where they have their own rate."""
        optimizer = super().create_optimizer(model)
        if self.router_learning_rate is not None:
            _split_group(self.model if model is None else model, optimizer, self.router_learning_rate)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro batch.

        Raises:
            GateError: A loss that is not finite, or too many bad samples.
        """
        self._note(inputs.pop("sample_ids"), inputs.pop("replaced"))
        self.tokens += inputs["input_ids"].numel()
        self.samples += inputs["input_ids"].shape[0]
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._not_finite(f"the gradient norm is {float(norm)}")
        self.recent_ids.clear()
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.weights_loaded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()

    def _note(self, ids: list[str], replaced: list[tuple[str, str]]) -> None:
        self.recent_ids += ids
        for name, reason in replaced:
            if name not in self.bad_samples:
                self.bad_samples[name] = reason
                self.log_bad(name, reason)
        if len(self.bad_samples) > self.max_bad_samples:
            raise GateError(
                f"{len(self.bad_samples)} bad samples, more than train.max_bad_samples={self.max_bad_samples}; "
                f"the last: {name}: {reason}",
                "clean the data with pmod data check --fix",
            )

    def log_bad(self, name: str, reason: str) -> None:
        """Log a sample that was replaced; overridden by whoever shows it."""
        import logging

        logging.getLogger(__name__).warning("sample %s replaced: %s", name, reason)

    def _not_finite(self, what: str) -> PmodError:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"last good checkpoint: {last}" if last else "no checkpoint yet"
        return GateError(
            f"step {self.state.global_step + 1}: {what}; samples {', '.join(self.recent_ids)}; {kept}",
            "lower train.learning_rate, or use train.dtype=bfloat16 or float32",
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a training folder."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).exists()]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _split_group(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    routers = {id(p) for name, p in model.named_parameters() if ROUTER.search(name) and p.requires_grad}
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if id(p) in routers]
        if ours:
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
            optimizer.add_param_group({**settings, "params": ours, "lr": rate})
