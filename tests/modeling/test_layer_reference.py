"""Every recorded layer case of the released code: outputs, choice of tokens, cache, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pmod_cli.modeling.cache import adopt_cache
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.decoders import MoDLlamaDecoderLayer
from pmod_cli.modeling.plan import RoutingPlan, RoutingRecord, count_tokens
from pmod_cli.modeling.settings import MoDConfig
from tests.common.reference import load_case, norm_settings

CASES = [
    "layer_b1_nopad",
    "layer_b1_ratios",
    "layer_b1_kzero",
    "layer_b3_rightpad",
    "layer_b2_samelen",
    "layer_gqa_b1",
]


def variants() -> list[tuple[str, str]]:
    return [(case, key[4:]) for case in CASES for key in sorted(load_case(case)[0]) if key.startswith("out.")]


def build_layer(case: str, variant: str, attention: str) -> tuple[Any, LlamaConfig]:
    norm, ratio = variant.rsplit(".r", 1)
    gqa = "gqa" in case
    weights, _ = load_case("layer_weights_gqa" if gqa else "layer_weights_mha")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=172,
        num_attention_heads=4,
        num_key_value_heads=2 if gqa else 4,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation=attention,
    )
    layer: Any = MoDLlamaDecoderLayer(config, 0)
    layer.add_router(64, MoDConfig([float(ratio)], **norm_settings(norm)), float(ratio))
    layer.load_state_dict(
        {
            name.removeprefix("decoder_layer.").replace("router.router", "router"): value
            for name, value in weights.items()
        }
    )
    return layer.eval(), config


def run(
    layer: Any,
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    hidden: Tensor,
    cache: Any = None,
    fused: bool = False,
) -> tuple[Tensor, Any]:
    vision, mask = tensors["mod_target_mask"], tensors.get("attention_mask")
    real = None if mask is None or bool(mask.all()) else mask
    targets, counts = count_tokens(vision, real)
    plan = RoutingPlan.from_counts(
        vision,
        real,
        targets,
        counts or [hidden.shape[1]] * len(hidden),
        [layer.retention_ratio],
        record=RoutingRecord(),
        fused=fused,
    )
    rope = LlamaRotaryEmbedding(config)(hidden, position_ids=tensors["position_ids"])
    output = layer(
        hidden,
        position_embeddings=rope,
        position_ids=tensors["position_ids"],
        routing_plan=plan,
        **{CACHE_ARGUMENT: cache},
    )
    assert plan.record is not None
    return output, plan.record.get(0)


@pytest.mark.parametrize("path", ["eager", "sdpa", "fused"])
@pytest.mark.parametrize(("case", "variant"), variants())
def test_output_and_choice(case, variant, path):
    tensors, _ = load_case(case)
    fused = path == "fused"
    layer, config = build_layer(case, variant, "sdpa" if fused else path)
    with torch.no_grad():
        output, routing = run(layer, config, tensors, tensors["hidden_states"], fused=fused)
    mask = tensors.get("attention_mask")
    real = torch.ones_like(tensors["mod_target_mask"]) if mask is None else mask
    torch.testing.assert_close(output[real], tensors[f"out.{variant}"][real], atol=2e-5, rtol=0)
    kept_vision = routing.kept & tensors["mod_target_mask"]
    assert torch.equal(kept_vision, tensors[f"kept_vision_mask.{variant}"])
    assert torch.equal(routing.kept & ~tensors["mod_target_mask"], real & ~tensors["mod_target_mask"])


@pytest.mark.parametrize("case", ["layer_b1_nopad", "layer_b3_rightpad", "layer_gqa_b1"])
def test_gradients(case):
    tensors, _ = load_case(case)
    layer, config = build_layer(case, "tanh_0.2_1.r0.5", "sdpa")
    hidden = tensors["hidden_states"].clone().requires_grad_()
    output, _ = run(layer, config, tensors, hidden)
    output.backward(tensors["grad_out"])
    real = tensors["attention_mask"]
    close = {"rtol": 1e-3, "atol": 2e-5}
    torch.testing.assert_close(hidden.grad[real], tensors["grad.hidden_states"][real], **close)
    torch.testing.assert_close(layer.router.weight.grad, tensors["grad.router.router.weight"], **close)
    torch.testing.assert_close(layer.router.bias.grad, tensors["grad.router.router.bias"], **close)
    for name in ("input_layernorm", "post_attention_layernorm"):
        torch.testing.assert_close(
            getattr(layer, name).weight.grad, tensors[f"grad.decoder_layer.{name}.weight"], **close
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["layer_b1_nopad", "layer_gqa_b1"])
def test_cache_holds_kept_tokens_only_and_decodes(case, attention):
    tensors, _ = load_case(case)
    layer, config = build_layer(case, "tanh_0.2_1.r0.5", attention)
    cache = DynamicCache(config=config)
    adopt_cache(cache, [0], config.num_hidden_layers)
    with torch.no_grad():
        run(layer, config, tensors, tensors["hidden_states"], cache)
        store = cache.layers[0]
        torch.testing.assert_close(store.keys, tensors["cache.key_after_prefill"], atol=2e-5, rtol=0)
        torch.testing.assert_close(store.values, tensors["cache.value_after_prefill"], atol=2e-5, rtol=0)
        assert store.get_seq_length() == tensors["hidden_states"].shape[1] > store.slots
        step = tensors["decode.hidden_states"]
        rope = LlamaRotaryEmbedding(config)(step, position_ids=tensors["decode.position_ids"])
        output = layer(step, position_embeddings=rope, **{CACHE_ARGUMENT: cache})
    torch.testing.assert_close(output, tensors["decode.out"], atol=2e-5, rtol=0)
