"""Schedules and names, for every number of layers and every setting (hypothesis)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.conversion.decoder import DecoderLayout, find_decoder, router_tensors
from pmod_cli.conversion.formats import Shard, Translation
from pmod_cli.conversion.restore import baseline_files, index_of
from pmod_cli.families import FAMILIES
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import mod_config, parse_recipe

ratio = st.floats(0.01, 1.0)
mod_settings = st.one_of(
    st.fixed_dictionaries(
        {
            "schedule": st.sampled_from(["shifted_cosine", "shifted_linear"]),
            "shift": st.floats(0, 1),
            "floor": st.floats(0.01, 0.5),
            "ceiling": st.floats(0.5, 1.0),
        }
    ),
    st.fixed_dictionaries(
        {"schedule": st.just("constant"), "ratio": ratio, "first_layer": st.integers(0, 50)}
    ),
    st.fixed_dictionaries({"schedule": st.just("interleaved"), "ratio": ratio}),
)


@given(mod_settings, st.integers(2, 80))
def test_every_schedule_is_whole_or_refused(settings, layers):
    recipe = parse_recipe({"name": "x", "mod": settings})
    try:
        mod = mod_config(recipe, layers)
    except PmodError:
        # Only what really cannot be: no layer is routed, or the setting names layers that do not exist.
        assert settings["schedule"] not in ("interleaved",)
        return
    assert len(mod.retention_ratios) == layers
    assert mod.mod_layers
    assert all(value is None or 0 < value <= 1 for value in mod.retention_ratios)
    if settings["schedule"].startswith("shifted"):
        present = [value for value in mod.retention_ratios if value is not None]
        assert present == sorted(present, reverse=True)
        assert mod.mod_layers == list(range(layers - len(present), layers))
        assert all(settings["floor"] <= value <= settings["ceiling"] for value in present)


@given(mod_settings, st.integers(-3, 1))
def test_a_schedule_needs_two_layers(settings, layers):
    with pytest.raises(PmodError, match="at least 2"):
        mod_config(parse_recipe({"name": "x", "mod": settings}), layers)


def decoder_tensors(family, prefix, layers, width, dtype):
    def tensor(name, *shape):
        return StoredTensor(name, dtype, shape, lambda: ())

    inside = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (2 * width, width),
        "self_attn.k_proj": (width, width),
        "self_attn.v_proj": (width, width),
        "self_attn.o_proj": (width, 2 * width),
        "mlp.gate_proj": (3 * width, width),
        "mlp.up_proj": (3 * width, width),
        "mlp.down_proj": (width, 3 * width),
    }
    stem = prefix.removesuffix("layers.")
    yield tensor(f"{stem}embed_tokens.weight", 7, width)
    for name in family.projector:
        yield tensor(name, width, 5 if name.endswith("linear_1.weight") else width)
    # A tower has layers too, and more of them than the decoder.
    for layer in range(layers + 3):
        yield tensor(f"vision_tower.encoder.layers.{layer}.self_attn.q_proj.weight", 5, 5)
    for layer in range(layers):
        for name, shape in inside.items():
            yield tensor(f"{prefix}{layer}.{name}.weight", *shape)


@given(
    st.sampled_from([(family, prefix) for family in FAMILIES for prefix in family.layer_prefixes]),
    st.integers(2, 24),
    st.integers(1, 64),
    st.sampled_from(["F32", "F16", "BF16"]),
    st.randoms(use_true_random=False),
)
def test_the_decoder_is_found_whatever_the_order_of_its_tensors(named, layers, width, dtype, random):
    family, prefix = named
    tensors = list(decoder_tensors(family, prefix, layers, width, dtype))
    random.shuffle(tensors)
    text = {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width, "vocab_size": 7,
        "num_attention_heads": 2, "head_dim": width, "num_key_value_heads": 1,
    }  # fmt: skip
    layout = find_decoder(family, {"text_config": text}, tensors)
    assert layout == DecoderLayout(prefix, layers, width, dtype)
    mod = mod_config(parse_recipe({"name": "x"}), layers)
    routers = router_tensors(mod, layout, {})
    names = [tensor.name for tensor in routers]
    assert len(set(names)) == len(names) == 2 * len(mod.mod_layers)
    assert not set(names) & {tensor.name for tensor in tensors}
    for layer in mod.mod_layers:
        # Beside the layer's own tensors, so that whatever renames those renames the router.
        assert f"{prefix}{layer}.router.weight" in names
        assert f"{prefix}{layer}.self_attn.q_proj.weight" in {tensor.name for tensor in tensors}

    cut = random.randint(0, len(tensors))
    shards = [Shard("a", tensors[:cut]), Shard("b", tensors[cut:]), Shard("routers", routers)]
    weight_map = index_of(shards)["weight_map"]
    assert {name for name, file in weight_map.items() if file == "routers"} == set(names)
    assert len(weight_map) == len(tensors) + len(names)

    dropped = random.choice([tensor for tensor in tensors if tensor.name.startswith(prefix)])
    with pytest.raises(PmodError, match=r"lack|decoder layers"):
        find_decoder(
            family,
            {"text_config": text},
            [tensor for tensor in tensors if tensor is not dropped],
        )


def test_routers_of_the_source_are_all_there_or_refused():
    layout = DecoderLayout("model.language_model.layers.", 4, 3, "F32")
    mod = mod_config(parse_recipe({"name": "x", "mod": {"schedule": "interleaved"}}), 4)
    given_routers = {
        layout.router_name(layer, part): StoredTensor.zeros(layout.router_name(layer, part), "F16", shape)
        for layer in (1, 3)
        for part, shape in (("weight", (1, 3)), ("bias", (1,)))
    }
    assert [tensor.name for tensor in router_tensors(mod, layout, given_routers)] == [
        f"model.language_model.layers.{layer}.router.{part}"
        for layer in (1, 3)
        for part in ("weight", "bias")
    ]
    less = {name: router for name, router in given_routers.items() if ".3.router.bias" not in name}
    with pytest.raises(PmodError, match="bias of layer 3's router is missing"):
        router_tensors(mod, layout, less)
    wrong = StoredTensor.zeros("w", "F16", (1, 4))
    with pytest.raises(PmodError, match=r"weight of layer 1's router has shape \[1, 4\], not \[1, 3\]"):
        router_tensors(mod, layout, {**given_routers, layout.router_name(1, "weight"): wrong})


def test_a_rewritten_source_keeps_a_dense_config_for_the_way_back():
    tensor = StoredTensor.zeros("a", "F32", (2,))
    kept = baseline_files(
        Translation(
            {"model_type": "llava"}, [Shard("model-00001-of-00001.safetensors", [tensor])], {"x": b""}
        )
    )
    assert set(kept) == {
        "baseline/config.json",
        "baseline/model.safetensors.index.json",
        "baseline/manifest.json",
    }
