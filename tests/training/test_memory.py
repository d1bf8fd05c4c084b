"""The memory estimate against what a forward pass really keeps."""

from __future__ import annotations

import pytest
import torch

from pmod_cli.modeling.schedule import shifted_cosine
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.recipe import default_recipe, load_recipe
from pmod_cli.training.memory import Workload, describe, estimate
from pmod_cli.training.model import add_lora, freeze, learn_choice
from tests.common.tiny import IMAGE, pictures, prompt, tiny_model

WIDE = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 1000}
GIB = 2**30


def _kept_bytes(model, inputs):
    """Bytes that autograd holds between the forward and the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs, use_cache=False).loss
    total = sum(held.values())
    loss.backward()
    return total


@pytest.mark.parametrize("mod", [None, MoDConfig([None, None, 0.8, 0.6, 0.4, 0.2, 0.15, 0.15])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_a_forward_pass_keeps(mod, dtype):
    model = tiny_model(mod=mod, **WIDE).train()
    freeze(model, vision_tower=True)
    ids = torch.tensor([prompt(4, 60, seed=seed) for seed in range(2)])
    labels = ids.masked_fill(ids == IMAGE, -100)
    first = 100
    inputs = {
        "input_ids": ids,
        "pixel_values": pictures(8),
        "labels": labels[:, first:],
        "logits_to_keep": ids.shape[1] - first,
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        measured = _kept_bytes(model, inputs)
    settings = default_recipe(
        [f"train.dtype={dtype}", "train.micro_batch_size=2", "train.gradient_checkpointing=false"]
    ).train
    found = estimate(describe(model, ids.shape[1], 100), settings, 1, None, None)
    assert found["activations"] == pytest.approx(measured, rel=0.2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert found["gradients"] == sum(gradient.nbytes for gradient in gradients) == 4 * trained
    assert found["optimizer"] == 8 * trained
    assert found["weights"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", ["null", "[routers, lora]"])
def test_activations_of_lora_are_what_a_forward_pass_keeps(parts, dtype):
    lora = "{r: 8, alpha: 8, dropout: 0.05}"
    settings = default_recipe(
        [
            f"train.dtype={dtype}",
            "train.micro_batch_size=2",
            "train.gradient_checkpointing=false",
            f"train.parts={parts}",
            f"train.distill={str(parts != 'null').lower()}",
            f"train.lora={lora}",
        ]
    ).train.model_copy(update={"distill": False})  # the dense model's turn keeps nothing
    model = tiny_model(mod=MoDConfig([None, None, 0.8, 0.6, 0.4, 0.2, 0.15, 0.15]), **WIDE).train()
    if settings.learns_choice:
        learn_choice(model)
    model = add_lora(model, settings)
    if dtype == "bfloat16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    ids = torch.tensor([prompt(4, 60, seed=seed) for seed in range(2)])
    labels = ids.masked_fill(ids == IMAGE, -100)[:, 100:]
    inputs = {
        "input_ids": ids,
        "pixel_values": pictures(8),
        "labels": labels,
        "logits_to_keep": labels.shape[1],
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        measured = _kept_bytes(model, inputs)
    found = estimate(describe(model, ids.shape[1], 100), settings, 1, None, None)
    assert found["activations"] == pytest.approx(measured, rel=0.2)


def _seven_billion(**changes):
    """LLaVA-1.5-7B as numbers."""
    return Workload(
        **{
            "trained": 6_759_000_000,
            "frozen": 304_000_000,
            "lora_trained": 320_000_000,
            "layers": 32,
            "hidden": 4096,
            "intermediate": 11008,
            "kv_width": 4096,
            "heads": 32,
            "vocabulary": 32064,
            "retention": shifted_cosine(32),
            "tokens": 2048,
            "vision_tokens": 576,
            **changes,
        }
    )


def test_a_7b_model_on_one_card_of_80_gb_gets_advice_that_helps():
    settings = load_recipe("pmod-llava-1.5-7b").train
    found = estimate(_seven_billion(), settings, 1, None, 80 * GIB)
    assert not found["fits"]
    assert found["total"] > 16 * 6.7e9
    advice = "\n".join(found["advice"])
    assert "train.micro_batch_size=1" in advice
    assert "zero3.yaml" in advice
    assert "LoRA" in advice
    assert "gradient_checkpointing" not in advice  # it is on already


def test_the_shipped_set_ups_fit_their_cards():
    paper = load_recipe("pmod-llava-1.5-7b").train
    for shards in ("zero1", "zero3", "fsdp"):
        assert estimate(_seven_billion(), paper, 8, shards, 80 * GIB)["fits"], shards
    assert not estimate(_seven_billion(), paper, 8, None, 80 * GIB)["fits"]
    small = load_recipe("lora-24gb").train
    subject = _seven_billion(trained=320_000_000 + 21_000_000, frozen=7_063_000_000)
    assert estimate(subject, small, 1, None, 24 * GIB)["fits"]
    assert not estimate(subject, small, 1, None, 16 * GIB)["fits"]
    small = load_recipe("calibrated-lora-llava-1.5-7b").train
    subject = _seven_billion(trained=160_000_000 + 131_000, frozen=7_063_000_000)
    assert estimate(subject, small, 1, None, 24 * GIB)["fits"]


def test_sharding_divides():
    settings = load_recipe("pmod-llava-1.5-7b").train
    one = estimate(_seven_billion(), settings, 8, "zero1", None)
    three = estimate(_seven_billion(), settings, 8, "zero3", None)
    assert three["weights"] * 8 == pytest.approx(one["weights"], abs=8)
    assert three["gradients"] * 8 == pytest.approx(one["gradients"], abs=8)
    assert three["optimizer"] == one["optimizer"]
    assert one["available"] is None
    assert one["fits"]
