"""The private parts of transformers and accelerate that `training/trainer.py` relies on are as they were."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import Trainer

from pmod_cli.training.trainer import PmodTrainer

OVERRIDDEN = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_run_epoch": None,  # passed on as it comes
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_trainer_still_has_what_is_overridden(name):
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert OVERRIDDEN[name] in (None, parameters)
    # Whatever calls it is private too: that it is called at all is what counts.
    assert f"self.{name}" in inspect.getsource(Trainer)


def test_no_other_private_method_is_overridden():
    ours = {name for name in vars(PmodTrainer) if name.startswith("_") and not name.startswith("__")}
    assert ours & set(dir(Trainer)) == set(OVERRIDDEN)


def test_the_norm_is_asked_for_before_the_optimizer_steps():
    source = inspect.getsource(Trainer)
    assert source.index("self._get_grad_norm(") < source.index("self.optimizer.step()")


def test_the_fsdp_plugin_still_takes_the_layers_by_name():
    assert "transformer_cls_names_to_wrap" in {field.name for field in fields(FullyShardedDataParallelPlugin)}
