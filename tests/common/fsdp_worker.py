"""``pmod`` where accelerate shards on the CPU too; run by ``accelerate launch`` from `test_fsdp`.

Two refusals are lifted, in this process alone: accelerate takes its FSDP branch on GPUs only (a list of back ends
without ``MULTI_CPU``), and `pmod finetune` therefore refuses to start. Everything else is what runs on GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

from pmod_cli.cli import main
from pmod_cli.training import preflight
from pmod_cli.training.trainer import PmodTrainer


def shard_on_the_cpu() -> None:
    """Have accelerate take gloo's processes for processes with GPUs while it chooses how to distribute."""
    choose, arguments = AcceleratorState.__init__, preflight.training_arguments

    def widened(self: Any, mixed_precision: Any = None, cpu: bool = False, **kwargs: Any) -> None:
        shared = PartialState(cpu)._shared_state
        if shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        choose(self, mixed_precision, cpu, **kwargs)

    def not_refused(*args: Any) -> Any:
        with mock.patch.object(preflight, "sharding", lambda: None):
            return arguments(*args)

    AcceleratorState.__init__ = widened
    preflight.training_arguments = not_refused


def kill_before(step: int) -> None:
    """Kill this process when it has done ``step`` optimizer steps and begins the next."""
    train = PmodTrainer.training_step

    def killed(self: PmodTrainer, *args: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, *args)

    PmodTrainer.training_step = killed


def report_shards(folder: Path) -> None:
    """After training, write the classes of what is sharded to a file per process."""
    gather = PmodTrainer.gathered_weights

    def reported(self: PmodTrainer) -> Any:
        classes = {
            type(part).__name__ for part in self.model_wrapped.modules() if isinstance(part, FSDPModule)
        }
        (folder / f"shards-{self.args.process_index}.json").write_text(json.dumps(sorted(classes)))
        return gather(self)

    PmodTrainer.gathered_weights = reported


if __name__ == "__main__":
    shard_on_the_cpu()
    report_shards(Path(os.environ["PMOD_OUT"]))
    if "PMOD_KILL" in os.environ:
        kill_before(int(os.environ["PMOD_KILL"]))
    sys.exit(main())
