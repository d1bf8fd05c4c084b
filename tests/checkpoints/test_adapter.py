"""An adapter's folder: what its config says is held to its weights before PEFT sees any of it."""

from __future__ import annotations

import json
import os

import pytest
import torch

from pmod_cli.checkpoints.adapter import open_adapter
from pmod_cli.checkpoints.shards import StoredTensor, write_shard
from pmod_cli.output.errors import PmodError

NAME = "model.layers.0.q_proj"
ENDLESS = "(([a-z_.0-9]+)+)+!"
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 4,
    "target_modules": ENDLESS,
    "exclude_modules": ENDLESS,
    "layers_pattern": ENDLESS,
    "modules_to_save": ["router"],
    "megatron_config": {"a": 1},
    "auto_mapping": {"parent_library": "x"},
}


def make_adapter(folder, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    names = (f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight", "model.layers.0.router.weight")
    shapes = ((4, 8), (8, 4), (1, 8))
    tensors = [
        StoredTensor.zeros(f"base_model.model.{name}", "F32", shape)
        for name, shape in zip(names, shapes, strict=True)
    ]
    write_shard(folder / "adapter_model.safetensors", tensors)
    return folder


def test_the_weights_say_which_layers_are_changed(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "lora", alpha_pattern={r"layers\.\d+.q_proj": 3}))
    assert (adapter.base, adapter.modules, len(adapter.tensors)) == ("base", (NAME,), 3)
    assert adapter.config["target_modules"] == [NAME]
    assert not any(
        adapter.config[key]
        for key in ("exclude_modules", "layers_pattern", "megatron_config", "auto_mapping")
    )
    assert "eva_config" not in adapter.config  # an older PEFT need not know it


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": ["a"]}, "names no base"),
        ({"base_model_name_or_path": {"a": 1}}, "names no base"),
        ({"base_model_name_or_path": True}, "names no base"),
        ({"base_model_name_or_path": "a/\0"}, "names no base"),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": "XLORA"}, "pmod merges LORA"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"rank_pattern": {ENDLESS: 4}}, "is no name of a layer"),
        ({"alpha_pattern": {ENDLESS: 4}}, "is no name of a layer"),
        ({"alpha_pattern": {".*.*.*x": 4}}, "is no name of a layer"),
        ({"modules_to_save": [ENDLESS]}, "is no name of a layer"),
        ({"modules_to_save": ["x" * 2000]}, "is no name of a layer"),
        ({"r": 10_000_000}, "r is 10000000, and no side of its weights is longer than 8"),
        ({"r": float("nan")}, "r is nan"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern of q_proj is 1000000000"),
        ({"init_lora_weights": "pissa_niter_100000000"}, "cannot be made again"),
        ({"init_lora_weights": {"a": 1}}, "cannot be made again"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens cannot be merged"),
        ({"layer_replication": [[0, 10**8]]}, "layer_replication cannot be merged"),
    ],
)  # fmt: skip
def test_what_a_config_may_not_say(tmp_path, config, message):
    with pytest.raises(PmodError, match=message):
        open_adapter(make_adapter(tmp_path / "lora", **config))


def test_a_folder_without_weights_that_can_be_read(tmp_path):
    folder = make_adapter(tmp_path / "lora")
    weights, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    weights.unlink()
    with pytest.raises(PmodError, match=r"lora has no weights \(expected adapter_model.safetensors\)"):
        open_adapter(folder)
    torch.save({f"base_model.model.{NAME}.lora_A.weight": torch.ones(4, 8)}, pickled)
    with pytest.raises(PmodError, match=r"adapter_model.bin is pickled, and could run code \(--allow-pickle"):
        open_adapter(folder)
    assert open_adapter(folder, allow_pickle=True).modules == (NAME,)
    torch.save({}, pickled)
    with pytest.raises(PmodError, match="they are empty"):
        open_adapter(folder, allow_pickle=True)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        os.mkfifo(folder / name)
        with pytest.raises(PmodError, match=f"{name} is not a regular file"):
            open_adapter(folder)
        (folder / name).unlink()
