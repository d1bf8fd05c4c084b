"""Every attention implementation gives the same logits: flex attention, and flash attention's 2-D mask path.

Flash attention's kernels need a GPU. Here the two kernel functions are replaced by the same mathematics in
PyTorch; everything between the layer and the kernel (unpadding, packing checks) is transformers' own.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, modeling_flash_attention_utils

from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.masks import causal_mask
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pad, pictures, prompt, tiny_model

MOD = MoDConfig([0.5, None, 0.6, 0.4, 0.4, 0.2, 0.15, 0.0])
PROMPTS = [prompt(1, 5, seed=1), prompt(0, 9, seed=2), prompt(2, 4, seed=3)]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
    """As in flash-attn: [batch, tokens, heads, head_dim]; causal masks align at the end."""
    new, total = q.shape[1], k.shape[1]
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new) if causal else None
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
    return output.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """As in flash-attn: the samples' real tokens one behind the other, [tokens, heads, head_dim]."""
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert (queries[-1], keys[-1]) == (len(q), len(k))
    spans = zip(queries, queries[1:], keys, keys[1:], strict=False)
    return torch.cat(
        [flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0] for a, b, c, d in spans]
    )


@pytest.fixture
def flash(monkeypatch):
    """Let transformers find flash attention; returns how to switch a model to it."""
    utils = modeling_flash_attention_utils
    kernels = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    found = kernels if hasattr(utils, "_flash_with_kvcache_fn") else kernels[:2] + kernels[3:]
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: found)
    monkeypatch.setattr(utils, "_loaded_implementation", None)

    def switch(model):
        model.config.text_config._attn_implementation_internal = "flash_attention_2"
        assert model.model.language_model.config._attn_implementation == "flash_attention_2"

    yield switch
    utils._loaded_implementation = None


def forward(model, ids, cache=None, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=cache is not None, **{CACHE_ARGUMENT: cache}, **inputs).logits


def conversation(model, side):
    """Logits at the real tokens of a padded prefill, a second turn with an image, and a decode step."""
    cache = DynamicCache()
    ids, mask = pad(PROMPTS, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    results = [
        forward(model, ids, cache, attention_mask=mask, position_ids=positions, pixel_values=pictures(3))
    ]
    masks = [mask.bool()]
    second = [prompt(0, 3, seed=4), prompt(1, 6, seed=5), prompt(0, 5, seed=6)]
    for turn, pixels in ((pad(second, "left"), pictures(1, seed=9)), (pad([[5], [6], [7]], "left"), None)):
        new, new_mask = turn
        mask = torch.cat([mask, new_mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        extra = {} if pixels is None else {"pixel_values": pixels}
        results.append(forward(model, new, cache, attention_mask=mask, position_ids=positions, **extra))
        masks.append(new_mask.bool())
    return [logits[real] for logits, real in zip(results, masks, strict=True)]


def alone(model):
    """The same with one sample and no padding, whose positions have gaps in every Mixture-of-Depths layer."""
    cache = DynamicCache()
    turns = [(PROMPTS[2], pictures(2)), (prompt(1, 6, seed=5), pictures(1, seed=9)), ([5], None)]
    start, results = 0, []
    for ids, pixels in turns:
        positions = torch.arange(start, start + len(ids))[None]
        extra = {} if pixels is None else {"pixel_values": pixels}
        results.append(forward(model, torch.tensor([ids]), cache, position_ids=positions, **extra))
        start += len(ids)
    return results


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_flash_attention_by_its_two_dimensional_mask(decoder, flash):
    model = tiny_model(decoder=decoder, mod=MOD)
    expected = {side: conversation(model, side) for side in ("left", "right")}
    expected["alone"] = alone(model)
    flash(model)
    actual = {side: conversation(model, side) for side in ("left", "right")}
    actual["alone"] = alone(model)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_flash_attention_mask_contract():
    config = tiny_model().config.text_config
    config._attn_implementation_internal = "flash_attention_2"
    queries, valid = torch.zeros(2, 3, 32), torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]).bool()
    assert causal_mask(config, queries, 2, None) is None
    assert causal_mask(config, queries, 2, valid) is valid


@pytest.mark.filterwarnings(
    "ignore:_compile flag on create_block_mask", "ignore:flex_attention called without"
)
def test_flex_attention():
    """Prefill, a second turn and a decode step, padded and not.

    Not compiled: the C++ that torch 2.14 makes of flex attention for a CPU and dynamic shapes does not compile.
    """
    model = tiny_model(mod=MOD)
    expected = {"left": conversation(model, "left"), "alone": alone(model)}
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    with torch.compiler.set_stance("default" if torch.cuda.is_available() else "force_eager"):
        actual = {"left": conversation(model, "left"), "alone": alone(model)}
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
def test_flash_attention_on_a_gpu():
    pytest.importorskip("flash_attn")
    model = tiny_model(mod=MOD, hidden_size=128).to("cuda", torch.bfloat16)
    ids, mask = (tensor.cuda() for tensor in pad(PROMPTS, "left"))
    inputs = {"attention_mask": mask, "pixel_values": pictures(3).to("cuda", torch.bfloat16)}
    expected = forward(model, ids, **inputs)[mask.bool()]
    model.set_attn_implementation({"text_config": "flash_attention_2"})
    actual = forward(model, ids, **inputs)[mask.bool()]
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
