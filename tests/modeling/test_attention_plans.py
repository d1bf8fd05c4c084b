"""No attention of a p-MoD model goes where torch prepares a plan for each shape (cuDNN), and nothing global changes.

Without a GPU the model is traced as on one: torch's fake tensors dispatch as CUDA tensors do, without data.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from pmod_cli.modeling.attention import PLAN_FREE, plan_free_attention
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.profiling.operators import OperatorCount
from tests.common.tiny import enable_checkpointing, tiny_model

FLASH = "aten._scaled_dot_product_flash_attention.default"
EFFICIENT = "aten._scaled_dot_product_efficient_attention.default"


@contextlib.contextmanager
def half():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def attention_operators(count):
    return {name: times for name, times in count.operators.items() if "attention" in name}


def as_on_a_gpu(training, batch, padded=False, **text):
    """Names of the attention operators in a forward pass of a p-MoD decoder on fake CUDA tensors."""
    mod = MoDConfig([None, 0.5, 0.2, 0.5])
    with FakeTensorMode(), torch.device("cuda"), half():
        model = tiny_model(mod=mod, num_hidden_layers=4, hidden_size=64, **text)
        decoder = model.model.language_model
        decoder.kernels = "torch"
        if training:
            model.train()
            enable_checkpointing(model)
        hidden = torch.empty(batch, 40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=training)
        target = torch.ones(batch, 40, dtype=torch.bool, device="cuda")
        # From counts that the host has: fake tensors hold no numbers to be read.
        plan = RoutingPlan.from_counts(
            target, target if padded else None, [25] * batch, [40] * batch, mod.retention_ratios
        )
        mask = target[:, None, None, :].expand(batch, 1, 40, 40) if padded else None
        with OperatorCount() as count:
            decoder(inputs_embeds=hidden, attention_mask=mask, routing_plan=plan, use_cache=False)
        with OperatorCount() as tower:
            model.model.vision_tower(torch.empty(batch, 3, 20, 20, device="cuda", dtype=torch.bfloat16))
    return attention_operators(count), attention_operators(tower)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_training(batch, training):
    decoder, tower = as_on_a_gpu(training, batch)
    # A trace never skips the dense layer's mask, as a real prefill does.
    assert decoder == {EFFICIENT: 1, FLASH: 3}
    assert tower == {FLASH: 2}


def test_padded_prefill_takes_masks_in_dense_layers_only():
    decoder, _ = as_on_a_gpu(False, 2, padded=True)
    assert decoder == {EFFICIENT: 1, FLASH: 3}


def test_transformers_sdpa_would_have_been_asked_otherwise():
    """The same trace of torch's own function: which back end it takes is torch's choice, cuDNN among them."""
    with FakeTensorMode(), OperatorCount() as count:
        query = torch.empty(1, 4, 40, 64, device="cuda", dtype=torch.bfloat16)
        module = torch.nn.Module()
        plan_free_attention(module, query, query, query, None)
    assert attention_operators(count) == {FLASH: 1}


def test_one_query_of_grouped_heads_copies_no_keys():
    with FakeTensorMode(), OperatorCount() as count:
        query = torch.empty(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
        key = torch.empty(2, 2, 50, 64, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(2, 1, 1, 50, dtype=torch.bool, device="cuda")
        output, _ = plan_free_attention(torch.nn.Module(), query, key, key, mask)
        assert output.shape == (2, 1, 8, 64)
    assert attention_operators(count) == {EFFICIENT: 1}
    assert not any("repeat" in name or "index" in name for name in count.operators)


def test_the_choice_is_the_models_alone():
    model = tiny_model()
    inner = model.model
    configs = [inner.language_model.config, inner.vision_tower.config]
    assert {config._attn_implementation for config in configs} == {PLAN_FREE}
    model.set_attn_implementation("eager")
    assert {config._attn_implementation for config in configs} == {"eager"}
    model.set_attn_implementation("sdpa")
    assert {config._attn_implementation for config in configs} == {PLAN_FREE}
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert PLAN_FREE not in str(model.config.to_dict())


def test_gradients_through_a_checkpoint_on_the_cpu():
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    module = torch.nn.Module()

    def attend(states):
        return plan_free_attention(module, states, states, states, None)[0]

    attend(query).sum().backward()
    expected, query.grad = query.grad, None
    checkpoint(attend, query, use_reentrant=False).sum().backward()
    assert torch.equal(query.grad, expected)
