"""The model classes: registration, saving and loading, equality with the dense baseline, routing output."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pmod_cli.families.llava import PmodLlavaCausalLMOutputWithPast
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.plan import plan_forward
from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import IMAGE, dense_counterpart, pad, pictures, prompt, tiny_config, tiny_model

IDS, PIXELS = torch.tensor([prompt(1, 10)]), pictures(1)


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_keeping_every_token_is_the_baseline_exactly(decoder, attention):
    model = tiny_model(decoder=decoder, mod=MoDConfig([1.0] * 8))
    for layer in model.model.language_model.layers:
        layer.router.reset_parameters()
    dense = dense_counterpart(model)
    for each in (model, dense):
        each.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=IDS, pixel_values=PIXELS).logits, dense(input_ids=IDS, pixel_values=PIXELS).logits
        )
        text = torch.tensor([prompt(0, 10)])
        assert torch.equal(model(input_ids=text).logits, dense(input_ids=text).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "pixel_values": PIXELS}
    assert torch.equal(model.generate(**inputs, **options), dense.generate(**inputs, **options))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_all_layers_dense_is_the_baseline(family):
    model = tiny_model(family, mod=None)
    dense = dense_counterpart(model)
    text = torch.tensor([prompt(0, 10)])
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, dense(input_ids=text).logits)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]


def names_in(path):
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_save_load_generate_round_trip(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"pmod_{family}"
    assert config["mod"]["retention_ratios"] == model.model.mod.retention_ratios
    assert config["mod"]["retention_ratios"][:2] == [None, None]
    # The baseline's names on disk stay as they are (transformers writes LLaVA's older ones); only routers are new.
    dense_counterpart(model).save_pretrained(tmp_path / "dense")
    saved, dense = (names_in(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "dense"))
    routers = {name for name in saved if ".router." in name}
    assert {re.sub(r".*layers", "layers", name) for name in routers} == {
        f"layers.{layer}.router.{part}" for layer in range(2, 8) for part in ("weight", "bias")
    }
    assert saved - routers == dense
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    inputs = {"input_ids": IDS, "pixel_values": PIXELS}
    if family == "llava_next":
        inputs = {"input_ids": torch.tensor([prompt(0, 10)])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))


def test_transformers_alone_refuses_the_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path)!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.returncode != 0
    assert "pmod_llava" in alone.stderr


ORDERS = (
    "import pmod_cli, transformers",
    "import transformers, pmod_cli",
    "from pmod_cli.modeling.layer import MoDDecoderLayer",
    "from pmod_cli.families.llava import PmodLlavaModel",
)


def test_import_registers_whatever_the_order():
    """Each order in a fork of a process that has imported what both need, and neither of them."""
    code = (
        "from transformers import AutoConfig, LlavaConfig\n"
        "assert type(AutoConfig.for_model('pmod_llava')).__name__ == 'PmodLlavaConfig'\n"
        "assert type(AutoConfig.for_model('pmod_llava_next')).__name__ == 'PmodLlavaNextConfig'\n"
        "from pmod_cli.families import llava\n"
        "from pmod_cli.modeling import decoders, layer\n"
        "assert globals().get('PmodLlavaModel', llava.PmodLlavaModel) is llava.PmodLlavaModel\n"
        "assert globals().get('MoDDecoderLayer', layer.MoDDecoderLayer) is layer.MoDDecoderLayer\n"
        "assert issubclass(decoders.MoDLlamaDecoderLayer, layer.MoDDecoderLayer)\n"
    )
    forks = (
        "import gc, os, sys\n"
        "import torch._dynamo, torch.distributed.tensor, torchvision\n"
        "assert not {'transformers', 'pmod_cli'} & set(sys.modules)\n"
        "gc.freeze()\n"
        f"for order in {ORDERS!r}:\n"
        "    if not os.fork():\n"
        f"        exec(order + chr(10) + {code!r}, globals())\n"
        "        print(order)\n"
        "        sys.exit()\n"
        "    os.wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", forks], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(ORDERS), done.stderr


def test_import_alone_loads_neither_torch_nor_transformers():
    code = (
        "import sys, pmod_cli, pmod_cli.cli\n"
        "assert not {'torch', 'transformers', 'pydantic', 'lmms_eval', 'fvcore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_output_routing():
    model = tiny_model()
    prompts = [prompt(1, 6), prompt(2, 3)]
    ids, mask = pad(prompts, "left")
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, pixel_values=pictures(3))
        routed = model(input_ids=ids, attention_mask=mask, pixel_values=pictures(3), output_routing=True)
        as_tuple = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pictures(3),
            output_routing=True,
            return_dict=False,
        )
    assert "routing" not in plain
    assert torch.equal(plain.logits, routed.logits)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], plain.logits)
    assert len(as_tuple[-1]) == 8
    vision = ids == IMAGE
    for ratio, routing in zip(model.model.mod.retention_ratios, routed.routing, strict=True):
        if ratio is None:
            assert routing is None
            continue
        counts = (routing.kept & vision).sum(-1).tolist()
        assert counts == [kept_tokens(25, ratio), kept_tokens(50, ratio)]
        assert torch.equal(routing.kept & ~vision, mask.bool() & ~vision)
        for sample in range(2):
            slots = slice(None) if routing.kept_slots is None else routing.kept_slots[sample]
            assert (
                routing.kept[sample].nonzero().flatten().tolist() == routing.indices[sample][slots].tolist()
            )
        torch.testing.assert_close(routing.weights[vision], 1 + 0.2 * routing.logits[vision].tanh())
        assert (routing.weights[~vision] == 1).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        plain = model(input_ids=IDS, pixel_values=PIXELS)
        output = model(input_ids=IDS, pixel_values=PIXELS, output_hidden_states=True)
    assert torch.equal(output.logits, plain.logits)
    assert len(output.hidden_states) == 9
    assert all(hidden.shape == (1, IDS.shape[1], 32) for hidden in output.hidden_states)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


def test_attentions_are_among_the_kept_tokens():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=IDS, pixel_values=PIXELS, output_attentions=True)
    text = IDS.shape[1] - 25
    for ratio, weights in zip(model.model.mod.retention_ratios, output.attentions, strict=True):
        kept = text + (25 if ratio is None else kept_tokens(25, ratio))
        assert weights.shape == (1, 4, kept, kept)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, kept))
        assert not weights.triu(1).any()


def test_return_dict_false():
    model = tiny_model()
    with torch.no_grad():
        output = model(input_ids=IDS, pixel_values=PIXELS)
        as_tuple = model(input_ids=IDS, pixel_values=PIXELS, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)
    assert len(as_tuple) == len(output.to_tuple())


def test_skipped_tokens_are_scaled_and_nothing_else():
    """STRing: a skipped vision token leaves the layer as its weight times what came in."""
    model = tiny_model()
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(
            lambda _, args, output, index=index: (
                (inputs.update({index: args[0]}), outputs.update({index: output}))[2:] or None
            )
        )
    with torch.no_grad():
        routing = model(input_ids=IDS, pixel_values=PIXELS, output_routing=True).routing
    for index, layer in enumerate(routing):
        if layer is not None:
            skipped = ~layer.kept
            expected = inputs[index] * layer.weights[..., None]
            assert torch.equal(outputs[index][skipped], expected[skipped])
            assert not torch.equal(outputs[index], expected)


def test_counts_that_do_not_match_are_an_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 25"):
        model(input_ids=IDS, pixel_values=pictures(2))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="2-D attention mask"):
        model(input_ids=IDS, pixel_values=PIXELS, attention_mask=torch.ones(1, 1, 35, 35))


def test_bad_configurations_are_errors():
    with pytest.raises(ValueError, match="3 retention ratios for 8 decoder layers"):
        tiny_model(mod=MoDConfig([None, 0.5, 0.5]))
    with pytest.raises(ValueError, match=r"1\.5 is outside"):
        MoDConfig([None, 1.5])
    with pytest.raises(ValueError, match="unknown weight norm 'tan'"):
        MoDConfig([0.5], weight_norm="tan")
    for bad, message in (
        (-1.0, "coverage -1.0 is not a number of 0 or more"),
        (float("nan"), "coverage nan is not"),
        ("much", "coverage 'much' is not"),
        ([1.0] * 3, "3 coverage strengths for 2 decoder layers"),
        ([1.0, None], "coverage None is not"),
    ):
        with pytest.raises(ValueError, match=message):
            MoDConfig([None, 0.5], coverage=bad)
    with pytest.raises(ValueError, match="unknown key in the mod section"):
        MoDConfig.from_dict({"retention_ratios": [0.5], "norm": "tanh"})
    config = tiny_config(decoder="mistral", sliding_window=16)
    with pytest.raises(ValueError, match="sliding-window"):
        AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("target", ["vision", "vision_hr", "all"])
def test_target_tokens(target):
    model = tiny_model("llava_next", mod=MoDConfig([None, 0.5] * 4, target_tokens=target))
    size = torch.tensor([[40, 30]])
    pixels = torch.randn(1, 5, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    features = model.model.get_image_features(pixels, image_sizes=size, return_dict=True).pooler_output[0]
    ids = torch.tensor([prompt(1, 8, tokens=len(features))])
    with torch.no_grad():
        routing = model(input_ids=ids, pixel_values=pixels, image_sizes=size, output_routing=True).routing[1]
    vision = ids == IMAGE
    first = int(vision[0].nonzero()[0])
    base = torch.zeros_like(vision)
    base[:, first : first + 25] = True
    targets = {"vision": vision, "vision_hr": vision & ~base, "all": torch.ones_like(vision)}[target]
    assert len(features) > 25
    assert routing.kept[~targets].all()
    assert int((routing.kept & targets).sum()) == kept_tokens(int(targets.sum()), 0.5)
    assert (routing.weights[~targets] == 1).all()


def next_features(model, pixels, size):
    return model.model.get_image_features(pixels, image_sizes=size, return_dict=True)


@pytest.mark.parametrize("target", ["vision", "vision_hr", "all"])
def test_target_tokens_of_an_image_that_continues_a_cache(target):
    """In the second turn only that turn's image (and for "all" its text) is routed."""
    model = tiny_model("llava_next", mod=MoDConfig([None, 0.5] * 4, target_tokens=target))
    size = torch.tensor([[40, 30]])
    pixels = torch.randn(1, 5, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    count = len(next_features(model, pixels, size).pooler_output[0])
    first = torch.tensor([prompt(1, 8, tokens=count)])
    second = torch.tensor([prompt(1, 5, seed=1, tokens=count)])
    cache = DynamicCache()
    routing = []
    for ids in (first, second):
        inputs = {"pixel_values": pixels, "image_sizes": size, CACHE_ARGUMENT: cache}
        with torch.no_grad():
            routing.append(model(input_ids=ids, **inputs, output_routing=True, use_cache=True).routing[1])
    targets = {"vision": count, "vision_hr": count - 25}
    for ids, layer in zip((first, second), routing, strict=True):
        routed = targets.get(target, ids.shape[1])
        assert int(layer.kept.sum()) == ids.shape[1] - routed + kept_tokens(routed, 0.5)
    assert cache.layers[1].slots == sum(int(layer.kept.sum()) for layer in routing)


def test_a_prompt_in_chunks_routes_each_chunk_by_itself():
    """Chunks whose images are encoded beforehand, as ``prefill_chunk_size`` has it."""
    model = tiny_model(mod=MoDConfig([None, 0.5] * 4))
    features = model.model.get_image_features(PIXELS, return_dict=True)
    rows = torch.cat(list(features.pooler_output))
    cache = DynamicCache()
    kept = 0
    for start in range(0, IDS.shape[1], 8):
        ids = IDS[:, start : start + 8]
        before = int((IDS[:, :start] == IMAGE).sum())
        count = int((ids == IMAGE).sum())
        piece = BaseModelOutputWithPooling(pooler_output=[rows[before : before + count]])
        encoded = {"mm_encoder_outputs": {"image": piece}} if count else {}
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache}, **encoded)
        kept += ids.shape[1] - count + kept_tokens(count, 0.5)
    assert cache.layers[1].slots == kept
    assert cache.get_seq_length() == IDS.shape[1]


def test_high_resolution_tokens_of_part_of_an_image_are_an_error():
    model = tiny_model("llava_next", mod=MoDConfig([None, 0.5] * 4, target_tokens="vision_hr"))
    piece = BaseModelOutputWithPooling(pooler_output=[torch.zeros(30, 32)])
    ids = torch.tensor([[1] + [IMAGE] * 30])
    with pytest.raises(ValueError, match="where each image's base tile ends"):
        model(input_ids=ids, mm_encoder_outputs={"image": piece})


def test_sequences_packed_into_one_are_an_error():
    model = tiny_model()
    ids = torch.cat([IDS, IDS], dim=1)
    positions = torch.arange(IDS.shape[1]).repeat(2)[None]
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=ids, position_ids=positions, pixel_values=pictures(2))
    model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], pixel_values=pictures(2))


def test_text_only_training_gives_every_router_a_zero_gradient():
    model = tiny_model().train()
    text = torch.tensor([prompt(0, 10)])
    model(input_ids=text, labels=text).loss.backward()
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    assert len(routers) == 12
    assert all(p.grad is not None and not p.grad.any() for p in routers)


def test_embeddings_with_placeholders_are_found_by_equality():
    model = tiny_model()
    with torch.no_grad():
        expected = model(input_ids=IDS, pixel_values=PIXELS, output_routing=True)
        embeds = model.get_input_embeddings()(IDS)
        output = model(inputs_embeds=embeds, pixel_values=PIXELS, output_routing=True)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.routing[-1].kept, expected.routing[-1].kept)


@pytest.mark.parametrize(("axes", "packed"), [(3, False), (4, True)])
def test_positions_of_pictures_fall_within_them(axes, packed):
    """M-RoPE: only the text's own positions, the first of four, tell of packed sequences."""
    length = IDS.shape[1]
    positions = torch.arange(length).repeat(axes, 1, 1)
    positions[0, 0, length // 2 :] = 0
    arguments = ((1, length), IDS == IMAGE, None, positions, [0.5], "vision")
    if packed:
        with pytest.raises(ValueError, match="packed"):
            plan_forward(*arguments)
    else:
        assert plan_forward(*arguments)[0] is not None


def test_the_output_with_routing_is_a_class_with_that_field():
    """What rebuilds outputs field by field (FSDP2), or pickles them, keeps the routing."""
    model = tiny_model()
    with torch.no_grad():
        output = model(input_ids=IDS, pixel_values=PIXELS, output_routing=True, use_cache=False)
    assert type(output) is PmodLlavaCausalLMOutputWithPast
    copied = dataclasses.replace(output, loss=torch.zeros(()))
    assert len(copied.routing) == 8
    again = pickle.loads(pickle.dumps(output))
    assert torch.equal(again.routing[-1].kept, output.routing[-1].kept)


def test_a_whole_model_can_be_pickled():
    model = tiny_model()
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(
            again(input_ids=IDS, pixel_values=PIXELS).logits, model(input_ids=IDS, pixel_values=PIXELS).logits
        )
