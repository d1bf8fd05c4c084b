"""The released p-MoD format: the recorded checkpoint, and others made of tiny models."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, DynamicCache

from pmod_cli.conversion.convert import convert, convert_back
from pmod_cli.conversion.formats import Options
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError
from tests.common.llava_checkpoints import flat_config, released_weights, save_checkpoint
from tests.common.reference import REFERENCE, load_case
from tests.common.tiny import IMAGE, pictures, prompt, tiny_model


def lay_out(folder, **changes):
    """The recorded checkpoint as its README says, with changes to its config."""
    folder.mkdir()
    shutil.copy(REFERENCE / "model_weights.safetensors", folder / "model.safetensors")
    shutil.copy(REFERENCE / "model_generation_config.json", folder / "generation_config.json")
    shutil.copytree(REFERENCE / "clip", folder / "clip")
    config = json.loads((REFERENCE / "model_config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folders of the recorded checkpoint, converted as LLaVA-1.5 (``pad``) and as LLaVA-NeXT (``anyres``)."""
    folder = tmp_path_factory.mktemp("released")
    result = {}
    for name, aspect in (("llava", "pad"), ("llava_next", "anyres")):
        source = lay_out(folder / f"{name}-released", image_aspect_ratio=aspect)
        result[name] = folder / name
        done = convert(plan_conversion(source), result[name])
        assert (done["format"], done["family"], done["recipe"]) == ("released", name, None)
    return result


@pytest.mark.parametrize(
    ("family", "case", "image_tokens"),
    [
        ("llava", "model_llava15_b1", 36),
        ("llava_next", "model_next_b1", 140),
        ("llava_next", "model_llava15_b1", 36),
    ],
    ids=["pad", "anyres", "one tile in an anyres model"],
)
def test_recorded_checkpoint(converted, family, case, image_tokens):
    tensors, description = load_case(case)
    model, info = AutoModelForImageTextToText.from_pretrained(converted[family], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if case == "model_llava15_b1" and family == "llava_next":
        inputs = {"pixel_values": tensors["pixel_values"]}
    else:
        image = Image.fromarray(tensors["image_uint8"].numpy())
        inputs = dict(AutoImageProcessor.from_pretrained(converted[family])(image, return_tensors="pt"))
        assert torch.equal(inputs["pixel_values"], tensors["pixel_values"])
    ids = tensors["input_ids"]
    position = int((ids[0] == -200).nonzero())
    image = torch.full((1, image_tokens), model.config.image_token_id)
    ids = torch.cat([ids[:, :position], image, ids[:, position + 1 :]], dim=1)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        output = model(
            input_ids=ids, output_routing=True, use_cache=True, **inputs, **{CACHE_ARGUMENT: cache}
        )
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            max_new_tokens=9,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = tensors["logits_prefill" if "logits_prefill" in tensors else "logits_prefill_last8"]
    logits = output.logits[:, -expected.shape[1] :, :256]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    vision = tensors["mod_target_mask"][0]
    kept = torch.stack([output.routing[layer].kept[0] & vision for layer in range(8, 32)])
    assert torch.equal(kept, tensors["kept_vision_masks"])
    assert [layer.keys.shape[-2] for layer in cache.layers] == description["kv_cache_len_after_prefill"]
    # Greedy although nothing says so: the generation config is clean, and the rows added are never picked.
    assert generated.sequences[0, ids.shape[1] :].tolist() == description["generated_ids"][1:]
    scores = torch.stack(generated.logits)[:, 0, :256]
    torch.testing.assert_close(scores, tensors["generate_scores"], atol=2e-5, rtol=0)


def test_recorded_prefill_decode_and_text(converted):
    model = AutoModelForImageTextToText.from_pretrained(converted["llava"])
    tensors, description = load_case("model_prefill_decode_b1")
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        output = model(
            inputs_embeds=tensors["inputs_embeds"],
            vision_mask=tensors["mod_target_mask"],
            use_cache=True,
            **{CACHE_ARGUMENT: cache},
        )
        torch.testing.assert_close(output.logits[..., :256], tensors["logits_prefill"], atol=2e-5, rtol=0)
        for token, expected in zip(tensors["decode_token_ids"], tensors["decode_logits"], strict=True):
            assert output.logits[0, -1].argmax() == token
            output = model(input_ids=token.view(1, 1), **{CACHE_ARGUMENT: cache})
            torch.testing.assert_close(output.logits[0, -1, :256], expected, atol=2e-5, rtol=0)
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths == description["kv_cache_len_after_8_decode_steps"]
    tensors, _ = load_case("model_text_only_b1")
    with torch.no_grad():
        logits = model(inputs_embeds=tensors["inputs_embeds"]).logits[..., :256]
    torch.testing.assert_close(logits, tensors["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("target", "expected"), [("vision_all", 140), ("vision_hr", 104), ("all", 154)])
def test_target_tokens(tmp_path, target, expected):
    source = lay_out(tmp_path / "source", mod_target_token_type=target)
    convert(plan_conversion(source), tmp_path / "pmod")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pmod")
    tensors, _ = load_case("model_next_b1")
    ids = tensors["input_ids"]
    position = int((ids[0] == -200).nonzero())
    image = torch.full((1, 140), model.config.image_token_id)
    ids = torch.cat([ids[:, :position], image, ids[:, position + 1 :]], dim=1)
    sizes = torch.tensor([[45, 70]])
    with torch.no_grad():
        output = model(
            input_ids=ids, pixel_values=tensors["pixel_values"], image_sizes=sizes, output_routing=True
        )
    ratio = model.config.mod["retention_ratios"][31]
    assert int((~output.routing[31].kept).sum()) == expected - int(expected * ratio)


def ratios(kind, layers, factor, ceiling, floor):
    """The release's schedule from its recorded description; it divides by 31 whatever the number of layers."""
    curve = {
        "shiftedcos": lambda i: math.cos(i * math.pi / 31) / 2 + factor,
        "shiftedlinear": lambda i: -i / 31 + 0.5 + factor,
    }[kind]
    raw = [curve(layer) for layer in range(layers)]
    return [None if ratio > ceiling else max(ratio, floor) for ratio in raw]


HALF = [None, 0.5] * 4
VARIANTS = {
    "shifted linear, GQA, sharded": (
        MoDConfig(ratios("shiftedlinear", 8, 0.4, 0.85, 0.15)),
        {"mod_target_layers": "shiftedlinear_decay_0.85_0.15", "mod_router_factor": 0.4},
        {"shards": 3},
        {"family": "llava"},
    ),
    "cosine, first layer routed, pickled": (
        MoDConfig(ratios("shiftedcos", 8, 0.3, 0.85, 0.15)),
        {"mod_target_layers": "shiftedcos_decay_0.85_0.15", "mod_router_factor": 0.3},
        {"pickled": True},
        {"family": "llava", "num_key_value_heads": 4},
    ),
    "sigmoid, interleaved, tower beside, pickled shards": (
        MoDConfig(HALF, weight_norm="sigmoid", weight_scale=1.0, weight_bias=0.0),
        {"mod_target_layers": "interleave", "mod_router_factor": 0.5, "mod_weight_norm": "sigmoid_1_0"},
        {"tower_inside": False, "pickled": True, "shards": 2},
        {"family": "llava"},
    ),
    "softmax, high resolution only": (
        MoDConfig(
            [None, None, *[0.4] * 5, None],
            weight_norm="softmax",
            weight_scale=1.0,
            weight_bias=1.0,
            target_tokens="vision_hr",
        ),
        {
            "mod_target_layers": "deep_all",
            "mod_router_factor": 0.4,
            "mod_weight_norm": "softmax",
            "mod_target_token_type": "vision_hr",
        },
        {"tower_inside": False},
        {"family": "llava_next"},
    ),
    "none, all tokens, no bias": (
        MoDConfig(
            [None, None, *[0.6] * 6],
            weight_norm="none",
            weight_scale=0.5,
            weight_bias=1.0,
            router_bias=False,
            target_tokens="all",
        ),
        {
            "mod_target_layers": "deep_all_include_last",
            "mod_router_factor": 0.6,
            "mod_weight_norm": "none_0.5_1",
            "mod_target_token_type": "all",
            "mod_bias_enabled": False,
        },
        {"shards": 2},
        {"family": "llava_next", "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_checkpoints_of_the_format(tmp_path, variant):
    mod, changes, layout, shape = VARIANTS[variant]
    model = tiny_model(**shape, mod=mod, seed=len(variant))
    source = save_checkpoint(
        tmp_path / "source",
        flat_config(model, **changes),
        released_weights(model),
        vision_config=model.config.vision_config,
        **layout,
    )
    if layout.get("pickled"):
        with pytest.raises(PmodError, match="--allow-pickle"):
            plan_conversion(source)
    options = Options(allow_pickle=bool(layout.get("pickled")))
    convert(plan_conversion(source, options=options), tmp_path / "pmod")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "pmod")
    assert again.config.mod_config == mod
    assert (again.config.image_token_id, again.config.text_config.vocab_size) == (IMAGE, 128)
    if shape["family"] == "llava":
        inputs = {"input_ids": torch.tensor([prompt(2, 9)]), "pixel_values": pictures(2)}
    else:
        model.model.config.released_anyres = True
        pixels, sizes = torch.randn(1, 5, 3, 20, 20), torch.tensor([[37, 39]])
        features = model.model.get_image_features(pixels, image_sizes=sizes, return_dict=True).pooler_output
        ids = prompt(1, 9, tokens=len(features[0]))
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_sizes": sizes}
    with torch.no_grad():
        expected = model(**inputs, output_routing=True)
        output = again(**inputs, output_routing=True)
    torch.testing.assert_close(output.logits[..., :IMAGE], expected.logits[..., :IMAGE], atol=1e-6, rtol=0)
    for layer in mod.mod_layers:
        assert torch.equal(output.routing[layer].kept, expected.routing[layer].kept)


def test_baseline_of_a_released_checkpoint(converted, tmp_path):
    convert_back(str(converted["llava_next"]), tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    assert "mod" not in config
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = json.loads((tmp_path / "dense" / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "LlavaNextImageProcessor"
    recorded = load_file(REFERENCE / "model_weights.safetensors")[
        "model.layers.9.decoder_layer.mlp.up_proj.weight"
    ]
    assert torch.equal(model.model.language_model.layers[9].mlp.up_proj.weight, recorded)


def test_generation_is_greedy_and_max_length_is_kept(tmp_path):
    source = lay_out(tmp_path / "source")
    (source / "generation_config.json").write_text(
        json.dumps(
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "max_length": 4096}
        )
    )
    convert(plan_conversion(source), tmp_path / "pmod")
    written = json.loads((tmp_path / "pmod" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


BAD_CONFIGS = {
    "mod_target_layers": ("shiftedcos_decay_1_0", "mod_target_layers 'shiftedcos_decay_1_0' is not known"),
    "mod_weight_norm": ("relu", "mod_weight_norm 'relu' is not known"),
    "mod_target_token_type": ("text", "mod_target_token_type 'text' is not known"),
    "mod_router_factor": (None, "no num_hidden_layers or mod_router_factor"),
    "mm_projector_type": ("linear", "mm_projector_type 'linear' is not supported"),
    "mm_patch_merge_type": ("flat", "mm_patch_merge_type 'flat' is not supported with anyres"),
    "mm_vision_tower": ("nowhere/at-all", "vision tower: no folder nowhere/at-all"),
    "image_grid_pinpoints": ("(1x1),...,(6x6)", "image_grid_pinpoints"),
    "num_hidden_layers": (31, "the weights have 32 decoder layers"),
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_bad_settings_are_one_line(tmp_path, key):
    value, message = BAD_CONFIGS[key]
    with pytest.raises(PmodError) as caught:
        plan_conversion(lay_out(tmp_path / "source", **{key: value}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.9.router.router.bias"), "layer 9's router"),
        (lambda weights: weights.pop("model.mm_projector.2.bias"), "linear_2.bias"),
        (lambda weights: weights.pop("lm_head.weight"), "lm_head"),
        (lambda weights: weights.pop("model.image_newline"), "image_newline"),
        (
            lambda weights: weights.pop("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"),
            "pre_layrnorm.bias",
        ),
        (lambda weights: weights.update({"model.strange.weight": torch.zeros(2)}), "model.strange.weight"),
        (
            lambda weights: weights.update({"model.layers.9.router.router.weight": torch.zeros(1, 3)}),
            "[1, 3], not [1, 64]",
        ),
    ],
)
def test_bad_weights_are_one_line(tmp_path, change, message):
    from safetensors.torch import save_file

    source = lay_out(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(PmodError) as caught:
        plan_conversion(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
