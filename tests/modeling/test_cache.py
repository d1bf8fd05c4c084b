"""The KV cache holds kept tokens only, and decoding on it equals a full forward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer

from pmod_cli.modeling.cache import KeptTokensLayer
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pad, pictures, prompt, tiny_model


def prefill(model, ids, cache, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache}, **inputs)


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_decode_equals_full_forward(decoder, attention):
    model = tiny_model(decoder=decoder)
    model.set_attn_implementation(attention)
    ids, pixels = torch.tensor([prompt(1, 12)]), pictures(1)
    with torch.no_grad():
        full = model(input_ids=ids, pixel_values=pixels).logits[0]
    # All tokens behind the image one at a time, then two at a time: the image is routed in the prefill alone.
    start = ids.shape[1] - 8
    for step in (1, 2):
        cache = DynamicCache(config=model.config.text_config)
        logits = [prefill(model, ids[:, :start], cache, pixel_values=pixels).logits[0]]
        for position in range(start, ids.shape[1], step):
            logits.append(prefill(model, ids[:, position : position + step], cache).logits[0])
        torch.testing.assert_close(torch.cat(logits), full, atol=1e-5, rtol=0)


def test_lengths_are_the_schedule():
    model = tiny_model()
    ids = torch.tensor([prompt(2, 9)])
    cache = DynamicCache()
    prefill(model, ids, cache, pixel_values=pictures(2))
    text = ids.shape[1] - 50
    expected = [
        50 + text if r is None else text + kept_tokens(50, r) for r in model.model.mod.retention_ratios
    ]
    assert [layer.keys.shape[-2] for layer in cache.layers] == expected
    assert [layer.values.shape[-2] for layer in cache.layers] == expected
    assert all(layer.get_seq_length() == ids.shape[1] for layer in cache.layers)
    assert cache.get_seq_length() == ids.shape[1]
    assert min(expected) < text + 0.2 * 50


def test_continuing_with_a_second_image_in_the_second_turn():
    """Both images in one batch item on a cache equals the same two turns, sample by sample, in a padded batch."""
    model = tiny_model()
    first, second = [prompt(1, 6, seed=1), prompt(1, 9, seed=2)], [prompt(1, 5, seed=3), prompt(0, 4, seed=4)]
    pixels = pictures(3)
    alone = []
    for sample in range(2):
        cache = DynamicCache()
        prefill(model, torch.tensor([first[sample]]), cache, pixel_values=pixels[sample : sample + 1])
        extra = {"pixel_values": pixels[2:]} if sample == 0 else {}
        logits = prefill(model, torch.tensor([second[sample]]), cache, **extra).logits
        alone.append((logits[0, -1], prefill(model, torch.tensor([[5]]), cache).logits[0, -1]))
    cache = DynamicCache()
    ids, mask = pad(first, "left")
    start = (mask.cumsum(-1) - 1).clamp(min=0)
    prefill(model, ids, cache, attention_mask=mask, pixel_values=pixels[:2], position_ids=start)
    more, more_mask = pad(second, "left")
    mask = torch.cat([mask, more_mask], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    turn = prefill(
        model,
        more,
        cache,
        attention_mask=mask,
        pixel_values=pixels[2:],
        position_ids=positions[:, -more.shape[1] :],
    ).logits
    mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
    step = prefill(
        model,
        torch.tensor([[5], [5]]),
        cache,
        attention_mask=mask,
        position_ids=mask.sum(-1, keepdim=True) - 1,
    ).logits
    for sample in range(2):
        torch.testing.assert_close(turn[sample, -1], alone[sample][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(step[sample, -1], alone[sample][1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("removed", [1, 3, 8, 14, 30])
def test_crop_equals_never_having_seen_the_tokens(removed):
    """Up to 12 words follow the image: larger cuts go into the routed chunk."""
    model = tiny_model(mod=MoDConfig([None, 0.5] * 4))
    ids = torch.tensor([prompt(1, 12)])
    cache = DynamicCache()
    before = prefill(model, ids[:, :-3], cache, pixel_values=pictures(1))
    prefill(model, ids[:, -3:], cache)
    slots = [layer.keys.shape[-2] for layer in cache.layers]
    cache.crop(-removed)
    assert cache.get_seq_length() == ids.shape[1] - removed
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, KeptTokensLayer):
            kept = before if removed <= 3 else None
            assert layer.slots <= slots[index] - min(removed, 11)
            positions = layer._all_positions(1, torch.zeros(1))
            assert int(positions.max()) < ids.shape[1] - removed
            assert kept is None or layer.slots == slots[index] - removed
    if removed <= 3:
        again = prefill(model, ids[:, -removed:], cache).logits
        with torch.no_grad():
            full = model(input_ids=ids, pixel_values=pictures(1)).logits
        torch.testing.assert_close(again, full[:, -removed:], atol=1e-5, rtol=0)


def test_crop_of_a_padded_batch_inside_the_routed_chunk():
    model = tiny_model(mod=MoDConfig([None, 0.5] * 4))
    ids, mask = pad([prompt(1, 8), prompt(0, 8), prompt(2, 4)], "left")
    cache = DynamicCache()
    prefill(model, ids, cache, attention_mask=mask, pixel_values=pictures(3))
    layer = cache.layers[1]
    used = [int(row.sum()) for row in layer.valid]
    cache.crop(-10)
    assert [int(row.sum()) for row in layer.valid] < used
    assert layer.keys.shape[-2] == layer.valid.shape[-1] == layer.positions.shape[-1]
    assert layer.get_seq_length() == ids.shape[1] - 10


def test_reorder_select_and_repeat():
    model = tiny_model()
    ids, mask = pad([prompt(1, 8), prompt(0, 8), prompt(2, 4)], "left")
    inputs = {"attention_mask": mask, "pixel_values": pictures(3)}
    step_ids, step_mask = torch.tensor([[7], [8], [9]]), torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    order = torch.tensor([2, 0, 0])
    for change, rows in (
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_select_indices(order), order),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        cache, plain = DynamicCache(), DynamicCache()
        prefill(model, ids, cache, **inputs)
        prefill(model, ids, plain, **inputs)
        expected = prefill(model, step_ids, plain, attention_mask=step_mask).logits
        change(cache)
        actual = prefill(model, step_ids[rows], cache, attention_mask=step_mask[rows]).logits
        torch.testing.assert_close(actual, expected[rows], atol=1e-5, rtol=0)


def test_layers_that_kept_nothing_of_the_prompt():
    """With ratio 0 and target tokens "all" a layer stores no token of the prompt, and the sequence goes on."""
    model = tiny_model(mod=MoDConfig([0.0, None, 0.5, 0.0] * 2, target_tokens="all"))
    prompts = [prompt(1, 8), prompt(1, 3), prompt(2, 4)]
    pixels, steps = pictures(4), torch.tensor([[7, 11, 13], [8, 12, 14], [9, 5, 6]])

    def decode(ids, mask, pixels, steps, before_last=lambda cache: None, rows=slice(None)):
        cache = DynamicCache()
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        prefill(model, ids, cache, attention_mask=mask, pixel_values=pixels, position_ids=places)
        assert cache.layers[0].slots == 0
        for step in steps.split(1, dim=1)[:-1]:
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            places = mask.sum(-1, keepdim=True) - 1
            prefill(model, step, cache, attention_mask=mask, position_ids=places)
        before_last(cache)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)[rows]
        places = mask.sum(-1, keepdim=True) - 1
        last = prefill(model, steps[:, -1:][rows], cache, attention_mask=mask, position_ids=places)
        return last.logits, cache

    ids, mask = pad(prompts, "left")
    batched, cache = decode(ids, mask, pixels, steps)
    assert cache.layers[0].keys.shape[-2] == 3
    for sample, (start, end) in enumerate([(0, 1), (1, 2), (2, 4)]):
        own = torch.tensor([prompts[sample]])
        alone, _ = decode(own, torch.ones_like(own), pixels[start:end], steps[sample : sample + 1])
        torch.testing.assert_close(batched[sample], alone[0], atol=1e-4, rtol=0)
    rows = torch.tensor([2, 0, 0])
    reordered, _ = decode(ids, mask, pixels, steps, lambda cache: cache.reorder_cache(rows), rows)
    torch.testing.assert_close(reordered, batched[rows], atol=1e-5, rtol=0)

    def there_and_back(cache):
        cache.crop(-2)
        assert (cache.layers[0].slots, cache.get_seq_length()) == (0, ids.shape[1])
        again = torch.cat([mask, mask.new_ones(3, 2)], dim=1)
        places = again.cumsum(-1)[:, -2:] - 1
        prefill(model, steps[:, :2], cache, attention_mask=again, position_ids=places)

    cropped, cache = decode(ids, mask, pixels, steps, there_and_back)
    torch.testing.assert_close(cropped, batched, atol=1e-5, rtol=0)
    cache.crop(-7)  # into the prompt, of which the layer has nothing
    assert (cache.layers[0].slots, cache.get_seq_length()) == (0, ids.shape[1] - 4)


def test_reset_and_reuse():
    # Every layer an MoD layer: a dense layer's reset is transformers' own, and before 5.24 it only zeroed.
    model = tiny_model(mod=MoDConfig([0.8, 0.5] * 4))
    ids, pixels = torch.tensor([prompt(1, 8)]), pictures(1)
    cache = DynamicCache()
    first = prefill(model, ids, cache, pixel_values=pixels).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(prefill(model, ids, cache, pixel_values=pixels).logits, first, atol=0, rtol=0)


def test_quantised_cache_is_refused_with_the_reason():
    class Stored(QuantizedLayer):
        """transformers' layer, without the package that would quantise (optimum-quanto or hqq)."""

        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    model = tiny_model()
    cache = Cache(layers=[Stored() for _ in range(8)])
    with pytest.raises(ValueError, match=r"which Stored of Cache cannot hold.*DynamicCache"):
        prefill(model, torch.tensor([prompt(1, 8)]), cache, pixel_values=pictures(1))


def test_offloading_moves_kept_tokens_and_brings_them_back():
    """What an offloaded cache does with a layer; the cache itself needs a GPU's streams."""
    model = tiny_model()
    ids = torch.tensor([prompt(1, 8)])
    cache, plain = DynamicCache(), DynamicCache()
    for each in (cache, plain):
        prefill(model, ids, each, pixel_values=pictures(1))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    step = torch.tensor([[7]])
    assert torch.equal(prefill(model, step, cache).logits, prefill(model, step, plain).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers' offloaded cache needs a GPU")
def test_offloaded_cache_on_a_gpu():
    model = tiny_model().cuda()
    ids, mask = (tensor.cuda() for tensor in pad([prompt(1, 8), prompt(2, 4)], "left"))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3).cuda()}
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [99]}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="offloaded"), expected)
