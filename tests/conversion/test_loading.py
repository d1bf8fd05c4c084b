"""Converted checkpoints in transformers: whatever names their parameters have, they load whole and compute the same."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from pmod_cli.checkpoints.shards import read_header, write_shard
from pmod_cli.conversion.convert import convert, convert_back
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.demo.job import BASELINE
from pmod_cli.recipe import parse_recipe
from tests.common import tiny
from tests.common.checkpoints import make_checkpoint, modern, old

EVERYTHING = parse_recipe({"name": "all", "mod": {"schedule": "explicit", "ratios": [1.0] * 8}})


def load(path, cls=AutoModelForImageTextToText):
    model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def generate(model, inputs):
    with torch.inference_mode():
        return model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()


@pytest.fixture(scope="module")
def demo_inputs():
    generator = torch.Generator().manual_seed(1)
    ids = [1, 9, *[4] * 100, *torch.randint(20, 300, (9,), generator=generator).tolist()]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 80, 80, generator=generator),
    }


@pytest.fixture(scope="module")
def demo_answer(demo_inputs):
    model = load(BASELINE, transformers.LlavaForConditionalGeneration)
    with torch.inference_mode():
        return model(**demo_inputs).logits, generate(model, demo_inputs)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rename", [str, modern, old])
def test_all_names_load_and_ratio_one_is_the_baseline(tmp_path, demo_inputs, demo_answer, rename, shards):
    source = make_checkpoint(tmp_path / "source", rename, shards)
    convert(plan_conversion(source, recipe=EVERYTHING), tmp_path / "pmod")
    model = load(tmp_path / "pmod")
    assert type(model).__name__ == "PmodLlavaForConditionalGeneration"
    assert model.config.mod_config.mod_layers == list(range(8))
    with torch.inference_mode():
        logits = model(**demo_inputs).logits
    assert torch.equal(logits, demo_answer[0])
    assert generate(model, demo_inputs) == demo_answer[1]


def test_routers_in_the_file_are_the_models(tmp_path):
    """A router under the old names of its layer is renamed as the layer is."""
    source = make_checkpoint(tmp_path / "source", old)
    convert(plan_conversion(source), tmp_path / "pmod")
    path = tmp_path / "pmod" / "model-routers.safetensors"
    from pmod_cli.checkpoints.shards import StoredTensor

    tensors = [
        StoredTensor.from_bytes(tensor.name, tensor.dtype, tensor.shape, b"\x40\x40" * (tensor.nbytes // 2))
        for tensor in read_header(path).values()
    ]
    write_shard(path, tensors)  # 0x4040 is 3.0 in bfloat16
    model = load(tmp_path / "pmod")
    for layer in range(2, 8):
        router = model.model.language_model.layers[layer].router
        assert (router.weight == 3).all()
        assert (router.bias == 3).all()


def test_saved_again_and_stripped(tmp_path, demo_inputs, demo_answer):
    """What ``save_pretrained`` (and so ``pmod finetune``) writes goes back to a dense checkpoint too."""
    convert(plan_conversion(BASELINE), tmp_path / "pmod")
    model = load(tmp_path / "pmod")
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["pmod"]["source"] == BASELINE.name  # the provenance stays
    convert_back(tmp_path / "saved", tmp_path / "dense")
    dense = load(tmp_path / "dense", transformers.LlavaForConditionalGeneration)
    with torch.inference_mode():
        assert torch.equal(dense(**demo_inputs).logits, demo_answer[0])


@pytest.mark.parametrize(
    ("family", "decoder"), [("llava_next", "mistral"), ("llava_next", "llama"), ("llava", "qwen2")]
)
def test_families_and_decoders(tmp_path, family, decoder):
    dense = tiny.dense_counterpart(tiny.tiny_model(family, decoder))
    dense.save_pretrained(tmp_path / "source")
    before = read_header(tmp_path / "source" / "model.safetensors")
    plan = plan_conversion(tmp_path / "source", recipe=EVERYTHING)
    assert (plan.family.name, plan.layout.dtype) == (family, "F32")
    convert(plan, tmp_path / "pmod")
    model = load(tmp_path / "pmod")
    sizes = {"image_sizes": torch.tensor([[30, 20]])} if family == "llava_next" else {}
    grid = (1, 3) if family == "llava_next" else (1,)
    pixels = torch.randn(*grid, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    tokens = 25
    if family == "llava_next":
        with torch.inference_mode():
            features = dense.get_image_features(pixels, sizes["image_sizes"]).pooler_output
        tokens = sum(len(feature) for feature in features)
    ids = torch.tensor([tiny.prompt(1, 6, tokens=tokens)])
    with torch.inference_mode():
        ours, theirs = (m(input_ids=ids, pixel_values=pixels, **sizes).logits for m in (model, dense))
    assert torch.equal(ours, theirs)
    convert_back(tmp_path / "pmod", tmp_path / "back")
    after = read_header(tmp_path / "back" / "model.safetensors")
    assert {name: tensor.read() for name, tensor in after.items()} == {
        name: tensor.read() for name, tensor in before.items()
    }
