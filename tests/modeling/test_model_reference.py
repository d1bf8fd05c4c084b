"""Every recorded model case of the released code: logits, choice of tokens, cache, generation, loss, gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pmod_cli.modeling.compat import CACHE_ARGUMENT
from tests.common.reference import load_case, reference_model
from tests.common.tiny import enable_checkpointing

MOD_LAYERS = range(8, 32)


@pytest.fixture(scope="module")
def llava():
    return reference_model("llava")


@pytest.fixture(scope="module")
def llava_next():
    return reference_model("llava_next")


def kept_vision(routing, vision_mask):
    return torch.stack([routing[layer].kept & vision_mask for layer in MOD_LAYERS])


@pytest.mark.parametrize("path", ["eager", "sdpa", "fused"])
def test_prefill_and_decode(llava, path):
    tensors, description = load_case("model_prefill_decode_b1")
    llava.set_attn_implementation("eager" if path == "eager" else "sdpa")
    llava.model.language_model.kernels = "fused" if path == "fused" else "torch"
    cache = DynamicCache(config=llava.config.text_config)
    vision = tensors["mod_target_mask"]
    with torch.no_grad():
        output = llava(
            inputs_embeds=tensors["inputs_embeds"],
            vision_mask=vision,
            use_cache=True,
            output_routing=True,
            output_hidden_states=True,
            **{CACHE_ARGUMENT: cache},
        )
        torch.testing.assert_close(output.logits[..., :256], tensors["logits_prefill"], atol=2e-5, rtol=0)
        assert torch.equal(kept_vision(output.routing, vision)[:, 0], tensors["kept_vision_masks"])
        logits = torch.stack([output.routing[layer].logits[0] for layer in MOD_LAYERS])
        torch.testing.assert_close(
            logits[:, vision[0]], tensors["router_logits"][:, vision[0]], atol=2e-5, rtol=0
        )
        for layer in (1, 8, 9, 16, 24, 31):
            expected = tensors[f"hidden_states.before_layer_{layer}"]
            torch.testing.assert_close(output.hidden_states[layer], expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            output.hidden_states[-1], tensors["hidden_states.final_norm"], atol=2e-5, rtol=0
        )
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        assert lengths == description["kv_cache_len_after_prefill"]
        for layer in (0, 8, 31):
            torch.testing.assert_close(
                cache.layers[layer].keys, tensors[f"cache.layer_{layer}.key"], atol=2e-5, rtol=0
            )
            torch.testing.assert_close(
                cache.layers[layer].values, tensors[f"cache.layer_{layer}.value"], atol=2e-5, rtol=0
            )
        token = output.logits[0, -1].argmax()
        for step in range(8):
            assert token == tensors["decode_token_ids"][step]
            step_output = llava(input_ids=token.view(1, 1), **{CACHE_ARGUMENT: cache})
            expected = tensors["decode_logits"][step]
            torch.testing.assert_close(step_output.logits[0, -1, :256], expected, atol=2e-5, rtol=0)
            token = step_output.logits[0, -1].argmax()
    assert [layer.keys.shape[-2] for layer in cache.layers] == description[
        "kv_cache_len_after_8_decode_steps"
    ]
    llava.set_attn_implementation("sdpa")
    llava.model.language_model.kernels = "auto"


def test_static_cache(llava):
    tensors, description = load_case("model_prefill_decode_b1")
    embeds = tensors["inputs_embeds"]
    cache = StaticCache(config=llava.config.text_config, max_cache_len=embeds.shape[1] + 8)
    with torch.no_grad():
        options = {"use_cache": True, CACHE_ARGUMENT: cache}
        output = llava(inputs_embeds=embeds, vision_mask=tensors["mod_target_mask"], **options)
        torch.testing.assert_close(output.logits[..., :256], tensors["logits_prefill"], atol=2e-5, rtol=0)
        used = [int(layer.used.sum()) for layer in cache.layers]
        assert used == description["kv_cache_len_after_prefill"]
        for step, token in enumerate(tensors["decode_token_ids"][:8]):
            logits = llava(input_ids=token.view(1, 1), **options).logits[0, -1, :256]
            torch.testing.assert_close(logits, tensors["decode_logits"][step], atol=2e-5, rtol=0)


def test_text_only(llava):
    tensors, _ = load_case("model_text_only_b1")
    embeds = tensors["inputs_embeds"]
    with torch.no_grad():
        without = llava(inputs_embeds=embeds).logits
        empty = llava(inputs_embeds=embeds, vision_mask=torch.zeros(1, 20, dtype=torch.bool)).logits
    torch.testing.assert_close(without[..., :256], tensors["logits"], atol=2e-5, rtol=0)
    assert torch.equal(without, empty)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_training_loss_and_gradients(checkpointing):
    tensors, _ = load_case("model_train_b2")
    model = reference_model("llava")
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
    model.train()
    embeds = tensors["inputs_embeds"].clone().requires_grad_()
    mask = tensors["attention_mask"]
    output = model(
        inputs_embeds=embeds,
        vision_mask=tensors["mod_target_mask"],
        attention_mask=mask.long(),
        labels=tensors["labels"],
        output_routing=True,
    )
    output.loss.backward()
    # The image token's extra row takes part in the softmax with a logit of 0: remove it before comparing losses.
    logits = output.logits[..., :256]
    shifted = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 256), tensors["labels"][:, 1:].reshape(-1)
    )
    torch.testing.assert_close(shifted, tensors["loss"][0], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[mask], tensors["logits"][mask], atol=4e-5, rtol=0)
    kept = kept_vision(output.routing, tensors["mod_target_mask"])
    assert torch.equal(kept, tensors["kept_vision_masks"])

    model.zero_grad()
    embeds.grad = None
    logits = model(
        inputs_embeds=embeds, vision_mask=tensors["mod_target_mask"], attention_mask=mask.long()
    ).logits[..., :256]
    torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 256), tensors["labels"][:, 1:].reshape(-1)
    ).backward()
    torch.testing.assert_close(embeds.grad[mask], tensors["grad.inputs_embeds"][mask], rtol=1e-3, atol=1e-5)
    layers = model.model.language_model.layers
    compared = 0
    for layer in MOD_LAYERS:
        for part in ("weight", "bias"):
            expected = tensors[f"grad.model.layers.{layer}.router.router.{part}"]
            actual = getattr(layers[layer].router, part).grad
            # The last layer's router gets no gradient but rounding noise: no later layer reads its vision tokens.
            tolerance = {"rtol": 0, "atol": 1e-5} if layer == 31 else {"rtol": 1e-3, "atol": 1e-6}
            torch.testing.assert_close(actual, expected, **tolerance)
            compared += 1
    assert compared == 48
    norms = {
        name: value for name, value in tensors.items() if name.startswith("grad.model.") and "norm" in name
    }
    assert norms
    parameters = dict(model.model.language_model.named_parameters())
    for name, expected in norms.items():
        ours = name.removeprefix("grad.model.").replace(".decoder_layer.", ".")
        torch.testing.assert_close(parameters[ours].grad, expected, rtol=1e-3, atol=1e-6)


def expand(ids: torch.Tensor, image_tokens: int) -> torch.Tensor:
    """Replace the release's image placeholder (-200) by so many image tokens (256)."""
    position = int((ids[0] == -200).nonzero())
    image = torch.full((1, image_tokens), 256)
    return torch.cat([ids[:, :position], image, ids[:, position + 1 :]], dim=1)


def generate(model, **inputs):
    output = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=9,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        suppress_tokens=[256],
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    return new, torch.stack(output.logits)[:, 0, :256]


def test_llava15_through_the_tower(llava):
    tensors, _ = load_case("model_llava15_b1")
    ids = expand(tensors["input_ids"], 36)
    inputs = {"input_ids": ids, "pixel_values": tensors["pixel_values"]}
    with torch.no_grad():
        output = llava(**inputs, output_routing=True)
        tokens, scores = generate(llava, **inputs)
    torch.testing.assert_close(output.logits[..., :256], tensors["logits_prefill"], atol=2e-5, rtol=0)
    assert torch.equal(
        kept_vision(output.routing, tensors["mod_target_mask"])[:, 0], tensors["kept_vision_masks"]
    )
    assert tokens.tolist() == tensors["generated_ids"][1:].tolist()
    torch.testing.assert_close(scores, tensors["generate_scores"], atol=2e-5, rtol=0)


def test_llava_next_through_the_tower(llava_next):
    tensors, _ = load_case("model_next_b1")
    height, width, _ = tensors["image_uint8"].shape
    ids = expand(tensors["input_ids"], int(tensors["mod_target_mask"].sum()))
    inputs = {
        "input_ids": ids,
        "pixel_values": tensors["pixel_values"],
        "image_sizes": torch.tensor([[height, width]]),
    }
    with torch.no_grad():
        output = llava_next(**inputs, output_routing=True)
        tokens, scores = generate(llava_next, **inputs)
    torch.testing.assert_close(
        output.logits[:, -8:, :256], tensors["logits_prefill_last8"], atol=2e-5, rtol=0
    )
    assert torch.equal(
        kept_vision(output.routing, tensors["mod_target_mask"])[:, 0], tensors["kept_vision_masks"]
    )
    assert tokens.tolist() == tensors["generated_ids"][1:].tolist()
    torch.testing.assert_close(scores, tensors["generate_scores"], atol=2e-5, rtol=0)
