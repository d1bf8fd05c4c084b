"""Ratio warm-up: every layer starts dense and comes down to its retention ratio over the first steps."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from pmod_cli.modeling.layer import MoDDecoderLayer


class RatioWarmup(TrainerCallback):
    """Sets the layers' ``retention_ratio`` before each step: from 1.0 in a straight line to the schedule's.

    The config keeps the schedule's ratios all along, so every checkpoint has them.

    Args:
        model: A p-MoD model.
        steps: From this step on the ratios are exactly the schedule's.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, MoDDecoderLayer)]
        self.targets = [layer.retention_ratio for layer in self.layers]
        self.steps = steps

    def set_step(self, step: int) -> None:
        """Set the ratios for the optimizer step that comes after ``step`` others."""
        for layer, target in zip(self.layers, self.targets, strict=True):
            share = min(1.0, step / self.steps)
            layer.retention_ratio = target if share == 1.0 else 1.0 + (target - 1.0) * share

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before each optimizer step."""
        self.set_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """However short the run was, the model ends on its schedule."""
        self.set_step(self.steps)
