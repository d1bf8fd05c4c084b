"""Names and settings of the original and the released format, as pure functions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.conversion.formats.llava_config import (
    decoder_config,
    grid_pinpoints,
    max_num_patches,
    mod_config,
    released_ratios,
    tower_config,
    weight_norm,
)
from pmod_cli.conversion.formats.llava_weights import (
    is_buffer,
    parse_key,
    rows_needed,
    tower_key,
    with_mean_rows,
)
from pmod_cli.output.errors import PmodError
from tests.common.llava_checkpoints import released_name
from tests.common.reference import REFERENCE

ENTRIES = json.loads((REFERENCE / "schedule.json").read_text())["entries"]

LAYER_PARTS = st.sampled_from(
    [f"self_attn.{side}_proj.{part}" for side in "qkvo" for part in ("weight", "bias")]
    + [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    + ["input_layernorm.weight", "post_attention_layernorm.weight", "router.weight", "router.bias"]
)
OTHERS = st.sampled_from(
    [
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
        "model.image_newline",
        "model.vision_tower.embeddings.class_embedding",
        "model.vision_tower.pre_layrnorm.weight",
        "model.vision_tower.encoder.layers.11.self_attn.out_proj.bias",
        "model.vision_tower.post_layernorm.bias",
        *(f"model.multi_modal_projector.linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")),
    ]
)
NAMES = st.one_of(
    st.builds("model.language_model.layers.{}.{}".format, st.integers(0, 200), LAYER_PARTS), OTHERS
)


@given(name=NAMES, mod_layers=st.sets(st.integers(0, 200)))
def test_names_survive_the_way_there_and_back(name, mod_layers):
    assert parse_key(released_name(name, mod_layers)) == name


@given(names=st.lists(NAMES, unique=True), mod_layers=st.sets(st.integers(0, 200)))
def test_no_two_parameters_get_one_name(names, mod_layers):
    assert len({parse_key(released_name(name, mod_layers)) for name in names}) == len(names)


@given(st.text(max_size=40))
def test_other_names_are_refused(text):
    key = parse_key(text)
    assert key is None or text in ("lm_head.weight", "model.image_newline")


def test_every_recorded_name():
    with safe_open(REFERENCE / "model_weights.safetensors", "pt") as file:
        names = [parse_key(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
    assert len(set(names)) == len(names)
    assert sum(".router." in name for name in names) == 48


def test_towers_of_their_own_and_old_buffers():
    assert tower_key("vision_model.encoder.layers.3.mlp.fc1.bias") == (
        "model.vision_tower.encoder.layers.3.mlp.fc1.bias"
    )
    for name in ("text_model.encoder.layers.3.mlp.fc1.bias", "logit_scale", "visual_projection.weight"):
        assert tower_key(name) is None
    assert is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_buffer("vision_model.embeddings.position_ids")


@pytest.mark.parametrize(
    "entry",
    ENTRIES,
    ids=lambda e: f"{e['mod_target_layers']}-{e['mod_router_factor']}-{e['num_hidden_layers']}",
)
def test_recorded_schedules_bit_for_bit(entry):
    # 24 layers included: the release divides by 31 whatever the number of layers, and so do its checkpoints.
    assert released_ratios(entry) == entry["ratio_per_layer"]


def test_weight_norms():
    assert weight_norm("tanh_0.2_1") == ("tanh", 0.2, 1.0)
    assert weight_norm("sigmoid_1_0") == ("sigmoid", 1.0, 0.0)
    assert [weight_norm(name)[1:] for name in ("tanh", "sigmoid", "softmax", "none")] == [(1.0, 1.0)] * 4
    for name in ("relu", "tanh_1", "tanh_a_b", "", "None"):
        with pytest.raises(PmodError, match="mod_weight_norm"):
            weight_norm(name)


def test_recorded_config():
    config = json.loads((REFERENCE / "model_config.json").read_text())
    mod = mod_config(config)
    assert mod.mod_layers == config["mod_target_layer_indices"]
    assert (mod.weight_norm, mod.weight_scale, mod.weight_bias) == ("tanh", 0.2, 1.0)
    assert (mod.router_bias, mod.target_tokens) == (True, "vision")
    assert mod_config(config | {"mod_bias_enabled": False}).router_bias is False
    text = decoder_config(config, "llama")
    assert not [name for name in text if name.startswith(("mm_", "mod_", "image_", "tokenizer_"))]
    assert (text["rope_theta"], text["rms_norm_eps"], text["num_key_value_heads"]) == (10000.0, 1e-5, 4)


def test_grids_are_swapped_in_their_order():
    pairs = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    swapped = [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
    assert grid_pinpoints({"image_grid_pinpoints": pairs}) == swapped
    assert grid_pinpoints({"image_grid_pinpoints": str(pairs)}) == swapped
    assert max_num_patches({"image_aspect_ratio": "anyres_max_9"}) == 9
    assert max_num_patches({"image_aspect_ratio": "anyres"}) is None


def test_tower_config_of_a_whole_clip():
    vision = {"hidden_size": 32, "image_size": 24, "patch_size": 4}
    nested = tower_config({"model_type": "clip", "vision_config": vision, "hidden_size": 7}, "clip")
    assert nested == {"model_type": "clip_vision_model", **vision}
    with pytest.raises(PmodError, match="only CLIP"):
        tower_config({"model_type": "siglip_vision_model"}, "siglip")


@given(
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    old=st.integers(1, 9),
    width=st.integers(1, 7),
    more=st.integers(1, 5),
    cut=st.integers(1, 11),
)
def test_new_rows_are_the_mean_of_the_old(dtype, old, width, more, cut):
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    table = torch.randn(old, width, generator=torch.Generator().manual_seed(old * width)).to(kind)
    data = table.view(torch.uint8).numpy().tobytes()
    # Chunks of any size: what is read from a file does not end where a row ends.
    stored = StoredTensor(
        "t", dtype, (old, width), lambda: [data[start : start + cut] for start in range(0, len(data), cut)]
    )
    larger = with_mean_rows(stored, old + more)
    assert larger.shape == (old + more, width)
    result = torch.frombuffer(bytearray(larger.read()), dtype=kind).view(old + more, width)
    assert torch.equal(result[:old], table)
    mean = torch.from_numpy(table.float().numpy().astype(np.float64).mean(0)).float().to(kind)
    torch.testing.assert_close(
        result[old:], mean.expand(more, -1), rtol=1e-2 if dtype == "BF16" else 1e-3, atol=1e-6
    )


def test_rows_needed():
    assert [rows_needed(32000, token) for token in (31999, 32000, 32063, 32064)] == [
        32000,
        32064,
        32064,
        32128,
    ]
