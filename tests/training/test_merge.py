"""An adapter that was made without a training run, merged into the demo's baseline."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pmod_cli.demo.job import BASELINE
from pmod_cli.output.errors import PmodError
from pmod_cli.training.merge import merge_adapter

WEIGHT = "language_model.model.layers.1.self_attn.q_proj.weight"
TUNER = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and a LoRA adapter of one of its layers."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(BASELINE, folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=r".*language_model\.layers\.1\.self_attn\.q_proj",
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "lora")
    return folder


def with_config(made, folder, **config):
    shutil.copytree(made / "lora", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "config", [{}, {"target_modules": "(([a-z_.0-9]+)+)+!"}, {"alpha_pattern": {"q_proj": 6}}]
)
def test_the_product_of_the_two_matrices_is_added(made, tmp_path, config):
    merge_adapter(with_config(made, tmp_path / "lora", **config), tmp_path / "out")
    before, after = weights(made / "base"), weights(tmp_path / "out")
    tuner = load_file(made / "lora" / "adapter_model.safetensors")
    update = tuner[TUNER.format("B")] @ tuner[TUNER.format("A")] * 3
    assert before.keys() == after.keys()
    dtype = after[WEIGHT].dtype
    torch.testing.assert_close(
        after[WEIGHT], (before[WEIGHT].float() + update).to(dtype), rtol=1e-2, atol=1e-3
    )
    assert [name for name in before if not torch.equal(before[name], after[name])] == [WEIGHT]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LoraConfig", {"target_modules": ["q_proj", "embed_tokens"], "exclude_modules": ".*vision.*"}),
        ("IA3Config", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ],
)
def test_every_kind_is_merged_as_peft_does(tmp_path, kind, settings):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(BASELINE)
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(**settings))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    wrapped.peft_config["default"].base_model_name_or_path = str(BASELINE)
    wrapped.save_pretrained(tmp_path / "tuned")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "expected")
    merge_adapter(tmp_path / "tuned", tmp_path / "out")
    expected, merged = weights(tmp_path / "expected"), weights(tmp_path / "out")
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-2, atol=1e-3)
    assert any(not torch.equal(merged[name], tensor) for name, tensor in weights(BASELINE).items())


def test_the_base_is_never_replaced(made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "base")
    files = [path.name for path in (tmp_path / "base").iterdir()]
    (tmp_path / "base" / ".pmod").write_text(json.dumps({"files": files}))
    adapter = with_config(made, tmp_path / "lora", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(PmodError, match="is an input, or holds it"):
        merge_adapter(adapter, tmp_path / "base", force=True)
    assert weights(tmp_path / "base").keys() == weights(made / "base").keys()


def test_what_does_not_fit_is_told(made, tmp_path):
    other = with_config(made, tmp_path / "other", base_model_name_or_path=str(made / "base"))
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.99"): each for name, each in tensors.items()},
        other / "adapter_model.safetensors",
    )
    with pytest.raises(PmodError, match=r"does not fit .*: 1 layers are not there, e.g. .*layers\.99"):
        merge_adapter(other, tmp_path / "out")
    shape = with_config(made, tmp_path / "shape", r=5)
    with pytest.raises(PmodError, match="does not fit"):
        merge_adapter(shape, tmp_path / "out")
    deep = with_config(made, tmp_path / "deep")
    (deep / "processor_config.json").write_text("[" * 100_000)
    with pytest.raises(PmodError, match="cannot load the processor of"):
        merge_adapter(deep, tmp_path / "out")
    assert not (tmp_path / "out").exists()
