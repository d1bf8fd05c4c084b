"""A p-MoD model dispatches no more operators than the dense model that it replaces.

At batch 1 on a GPU the host is the limit, so the number of operators is the time. Both models have the layers of
LLaVA-1.5-7B (24 in the tower, 32 in the decoder) with tiny widths; views and allocations are not counted.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama import modeling_llama

from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.schedule import shifted_cosine
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.profiling.operators import OperatorCount

LAYERS = 32
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 24,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def models():
    parts = {"vision_config": CLIPVisionConfig(**VISION), "image_token_index": 150}
    mod = MoDConfig(shifted_cosine(LAYERS)).to_dict()
    dense = LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**TEXT), **parts)).eval()
    config = PmodLlavaConfig(text_config=LlamaConfig(**TEXT), **parts, mod=mod)
    return dense, PmodLlavaForConditionalGeneration(config).eval()


def counted(model, batch, kernels="torch", padding=0):
    """Operators of a prefill and of a decode step."""
    if hasattr(model.model.language_model, "kernels"):
        model.model.language_model.kernels = kernels
    ids = torch.full((batch, 30), 7)
    ids[:, 5:21] = 150
    if batch > 1:
        ids[0, 5:21] = 7  # a sample of text alone: the others keep fewer tokens
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    pixels = torch.rand(int((ids == 150).any(-1).sum()), 3, 56, 56)
    with torch.no_grad():
        with OperatorCount() as prefill:
            output = model(
                input_ids=ids, pixel_values=pixels, attention_mask=mask, use_cache=True, logits_to_keep=1
            )
        cache = output[CACHE_ARGUMENT]
        steps = []
        for _ in range(2):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            with OperatorCount() as step:
                model(input_ids=ids[:, :1], attention_mask=mask, use_cache=True, **{CACHE_ARGUMENT: cache})
            steps.append(step.total)
    return prefill, steps[1]  # the first step may make room for many


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 0), (3, 2)])
def test_against_the_dense_model_as_transformers_runs_it(models, batch, padding):
    dense, pmod = models
    dense_prefill, dense_step = counted(dense, batch, padding=padding)
    for kernels in ("torch", "fused"):
        prefill, step = counted(pmod, batch, kernels, padding=padding)
        assert step <= dense_step
        reads = "aten._local_scalar_dense.default"
        assert prefill.operators[reads] <= dense_prefill.operators[reads]
    assert prefill.total <= dense_prefill.total


def test_with_the_same_fused_kernels_on_both_sides(models, monkeypatch):
    """Norms, rotary embedding and SwiGLU as one operator each, as kernels of others make them."""
    library = torch.library.Library("pmod_test", "FRAGMENT")
    library.define("norm(Tensor x, Tensor weight, float epsilon) -> Tensor")
    library.define("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
    library.define("swiglu(Tensor gate, Tensor up) -> Tensor")
    rope = modeling_llama.apply_rotary_pos_emb
    library.impl("norm", lambda x, weight, eps: nn.functional.rms_norm(x, weight.shape, weight, eps), "CPU")
    library.impl("rope", lambda *tensors: tuple(each.clone() for each in rope(*tensors)), "CPU")
    library.impl("swiglu", lambda gate, up: nn.functional.silu(gate) * up, "CPU")
    ops = torch.ops.pmod_test
    monkeypatch.setattr(
        modeling_llama.LlamaRMSNorm,
        "forward",
        lambda self, x: ops.norm(x, self.weight, self.variance_epsilon),
    )
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **_: ops.rope(q, k, cos, sin)
    )
    monkeypatch.setattr(
        modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x))),
    )
    dense, pmod = models
    dense_prefill, dense_step = counted(dense, 1)
    prefill, step = counted(pmod, 1, "fused")
    assert prefill.operators["pmod_test.rope.default"] == LAYERS
    assert prefill.total <= 1.25 * dense_prefill.total
    assert step <= dense_step
