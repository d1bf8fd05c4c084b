"""What happens between two optimizer steps: ratio warm-up, and a stop at SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from pmod_cli.modeling.layer import MoDDecoderLayer
from pmod_cli.output.errors import PmodError


class Preempted(PmodError):
    """SIGTERM came and a checkpoint was saved. The exit code is the shell's for SIGTERM."""

    exit_code = 143


class StopAtSignal(TrainerCallback):
    """Clusters send SIGTERM before they take a machine back: all processes finish the step, save and stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signal while the body runs."""

        def ask(number: int, frame: Any) -> None:
            self.asked = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process got the signal."""
        if args.world_size > 1:
            # The signal reaches the processes in different steps; one that stopped alone would leave the others
            # waiting for it.
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True


class RatioWarmup(TrainerCallback):
    """Lowers the layers' ``retention_ratio`` in a straight line: from 1.0 (dense) to the schedule's, after ``steps``.

    The config keeps the schedule's ratios all along, so every checkpoint has them.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, MoDDecoderLayer)]
        self.targets = [layer.retention_ratio or 0.0 for layer in self.layers]
        self.steps = steps

    def set_step(self, step: int) -> None:
        """Set the ratios for the optimizer step that comes after ``step`` others."""
        share = min(1.0, step / self.steps)
        for layer, target in zip(self.layers, self.targets, strict=True):
            layer.retention_ratio = target if share == 1.0 else 1.0 + (target - 1.0) * share

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the ratios of the coming step."""
        self.set_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """However short the run was, the model ends on its schedule."""
        self.set_step(self.steps)
