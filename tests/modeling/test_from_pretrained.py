"""`from_pretrained`: placement, dtype, shards, missing routers, bitsandbytes."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from pmod_cli.modeling.router import Router
from tests.common.tiny import dense_counterpart, pictures, prompt, tiny_model

IDS, PIXELS = torch.tensor([prompt(1, 10)]), pictures(1)


def logits(model, dtype=torch.float32):
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=PIXELS.to(dtype)).logits


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, wide enough for 4-bit kernels, and its folder of several shards."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model(hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model, folder


def test_shards(saved):
    model, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert torch.equal(logits(load(folder)), logits(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": 0 if torch.cuda.is_available() else "cpu"}])
def test_device_map(saved, device_map):
    model, folder = saved
    loaded = load(folder, device_map=device_map)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    torch.testing.assert_close(logits(loaded).cpu(), logits(model), atol=1e-4, rtol=0)


def test_device_map_leaves_decoder_layers_whole(saved, tmp_path):
    """The second half of the decoder on disk, loaded layer by layer."""
    model, folder = saved
    names = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    places = dict.fromkeys((*names, "model.language_model.embed_tokens"), "cpu")
    places |= dict.fromkeys(("model.language_model.norm", "model.language_model.rotary_emb"), "cpu")
    for layer in range(8):
        places[f"model.language_model.layers.{layer}"] = "cpu" if layer < 4 else "disk"
    loaded = load(folder, device_map=places, offload_folder=tmp_path)
    layers = loaded.model.language_model.layers
    assert layers[7].router.weight.is_meta
    assert not layers[3].router.weight.is_meta
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
    assert {"LlamaDecoderLayer", "MoDLlamaDecoderLayer"} <= set(loaded._no_split_modules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(saved, dtype):
    _, folder = saved
    loaded = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.dtype == dtype
    with torch.no_grad():
        output = loaded(input_ids=IDS, pixel_values=PIXELS.to(dtype), output_routing=True)
    assert output.logits.isfinite().all()
    assert {layer.logits.dtype for layer in output.routing if layer is not None} == {torch.float32}


def test_missing_router_tensors_start_at_zero_and_are_named(tmp_path, caplog, monkeypatch):
    model = tiny_model()
    dense_counterpart(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "pmod_llava", "mod": model.model.mod.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers"):
        loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert "router" in caplog.text
    assert "MISSING" in caplog.text or "newly initialized" in caplog.text
    routers = {name: value for name, value in loaded.named_parameters() if ".router." in name}
    assert set(info["missing_keys"]) == set(routers)
    assert len(routers) == 12
    assert all(not value.any() for value in routers.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_bitsandbytes_leaves_routers_in_full_precision(saved, bits):
    """On the CPU backend of bitsandbytes; the vision tower is too narrow here for its 4-bit kernel."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, folder = saved
    options = (
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
        if bits == 4
        else {"load_in_8bit": True}
    )
    options["llm_int8_skip_modules"] = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    loaded = load(folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32)
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    for layer, original in zip(
        loaded.model.language_model.layers, model.model.language_model.layers, strict=True
    ):
        assert type(layer.mlp.up_proj) is kind
        assert type(layer.self_attn.q_proj) is kind
        if hasattr(original, "router"):
            assert type(layer.router) is Router
            assert torch.equal(layer.router.weight, original.router.weight)
    generated = loaded.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), pixel_values=PIXELS, max_new_tokens=3
    )
    assert generated.shape[1] > IDS.shape[1]
