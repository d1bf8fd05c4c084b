"""A static cache: fixed capacities, the tokens of the dynamic one, and one compiled graph for prompts of like size."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from pmod_cli.modeling.cache import StaticKeptTokensLayer
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pad, pictures, prompt, tiny_model

BATCH = [prompt(1, 8), prompt(0, 8), prompt(2, 4)]


def answers(model, prompts, side="left", images=3, **options):
    ids, mask = pad(prompts, side)
    if images:
        options["pixel_values"] = pictures(images)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[99],
        **options,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompts", [BATCH[:1], BATCH, [prompt(0, 7)]], ids=["one", "batch", "text"])
def test_same_tokens_as_the_dynamic_cache(prompts, attention):
    for decoder, mod in (("llama", "cosine"), ("qwen2", MoDConfig([0.5, None, 0.0, 1.0] * 2, coverage=2.0))):
        model = tiny_model(decoder=decoder, mod=mod)
        model.set_attn_implementation(attention)
        images = sum(each.count(99) for each in prompts) // 25
        expected = answers(model, prompts, images=images)
        static = answers(model, prompts, images=images, cache_implementation="static")
        assert torch.equal(static, expected)


def test_beams():
    model = tiny_model()
    expected = answers(model, BATCH, num_beams=3)
    assert torch.equal(answers(model, BATCH, num_beams=3, cache_implementation="static"), expected)


def test_every_layer_has_its_own_capacity_and_logits_are_those_of_a_full_pass():
    model = tiny_model(mod=MoDConfig([None, 0.5, 0.1, 0.9] * 2))
    ids, pixels = torch.tensor([prompt(4, 12)]), pictures(4)
    cache = StaticCache(config=model.config.text_config, max_cache_len=ids.shape[1] + 4)
    start = ids.shape[1] - 6
    with torch.no_grad():
        full = model(input_ids=ids, pixel_values=pixels).logits[0]
        outputs = [
            model(input_ids=ids[:, :start], pixel_values=pixels, use_cache=True, **{CACHE_ARGUMENT: cache})
        ]
        for first, last in ((start, start + 1), (start + 1, start + 4), (start + 4, ids.shape[1])):
            outputs.append(model(input_ids=ids[:, first:last], use_cache=True, **{CACHE_ARGUMENT: cache}))
    torch.testing.assert_close(torch.cat([each.logits[0] for each in outputs]), full, atol=1e-5, rtol=0)
    assert all(isinstance(layer, StaticKeptTokensLayer) for layer in cache.layers)
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {ids.shape[1]}
    text = ids.shape[1] - 100
    kept = [100 if ratio is None else kept_tokens(100, ratio) for ratio in model.model.mod.retention_ratios]
    assert [int(layer.used.sum()) for layer in cache.layers] == [text + each for each in kept]
    # Room for what is kept and for new tokens, by whole buckets of 64 dropped ones.
    assert [layer.keys.shape[-2] for layer in cache.layers] == [128, 128, 64, 128] * 2


def test_one_graph_for_every_step_and_for_prompts_of_like_size():
    model = tiny_model()
    options = CompileConfig(fullgraph=True, mode="default")
    options._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    for words in (12, 9, 14):
        expected = answers(model, [prompt(1, words)], images=1)
        static = answers(
            model, [prompt(1, words)], images=1, cache_implementation="static", compile_config=options
        )
        assert torch.equal(static, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("implementation", "reason"), [("flex_attention", "needs sdpa or eager attention, not flex_attention")]
)
def test_refused_with_the_reason(implementation, reason):
    model = tiny_model()
    model.set_attn_implementation({"text_config": implementation})
    with pytest.raises(ValueError, match=reason):
        answers(model, BATCH[:1], images=1, cache_implementation="static")


def test_crop_is_refused_and_reset_starts_anew():
    model = tiny_model()
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    inputs = {"input_ids": torch.tensor([prompt(1, 6)]), "pixel_values": pictures(1), CACHE_ARGUMENT: cache}
    with torch.no_grad():
        first = model(**inputs, use_cache=True).logits
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(-1)
        cache.reset()
        assert torch.equal(model(**inputs, use_cache=True).logits, first)
