"""Mixed batches give each sample what it gets alone: no images, one, several; padded on either side."""

from __future__ import annotations

import pytest
import torch

from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pad, pictures, prompt, tiny_model

IMAGES = [1, 0, 2, 1]
PROMPTS = [prompt(count, 5 + 3 * index, seed=index) for index, count in enumerate(IMAGES)]
PIXELS = pictures(sum(IMAGES))


def own_pixels(sample: int):
    start = sum(IMAGES[:sample])
    return PIXELS[start : start + IMAGES[sample]] if IMAGES[sample] else None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_prefill_equals_one_by_one(side, decoder, attention):
    model = tiny_model(decoder=decoder)
    model.set_attn_implementation(attention)
    ids, mask = pad(PROMPTS, side)
    with torch.no_grad():
        batched = model(input_ids=ids, attention_mask=mask, pixel_values=PIXELS, output_routing=True)
        for sample, own in enumerate(PROMPTS):
            alone = model(input_ids=torch.tensor([own]), pixel_values=own_pixels(sample), output_routing=True)
            real = mask[sample].bool()
            torch.testing.assert_close(batched.logits[sample, real], alone.logits[0], atol=1e-4, rtol=0)
            for layer, routing in enumerate(alone.routing):
                if routing is not None:
                    assert torch.equal(batched.routing[layer].kept[sample, real], routing.kept[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "mod",
    [
        MoDConfig([None, None, 0.8, 0.6, 0.4, 0.2, 0.15, 0.15]),
        MoDConfig([0.5, None, 0.6, 0.4, 0.4, 0.2, 0.15, 0.0]),
        MoDConfig([0.5, None, 0.6, 0.4, 0.4, 0.2, 0.15, 0.0], target_tokens="all"),
        MoDConfig([None, 0.8, 0.6, 0.4, 0.4, 0.2, 0.15, 0.0], coverage=[0, 1, 2, 4, 0, 8, 1, 1]),
    ],
    ids=["first layers dense", "first layer routed", "all tokens routed", "coverage"],
)
def test_greedy_generation_equals_one_by_one(attention, mod):
    model = tiny_model(mod=mod)
    model.set_attn_implementation(attention)
    ids, mask = pad(PROMPTS, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "suppress_tokens": [99]}
    batched = model.generate(input_ids=ids, attention_mask=mask, pixel_values=PIXELS, **options)
    for sample, own in enumerate(PROMPTS):
        own_ids = torch.tensor([own])
        pixels = own_pixels(sample)
        inputs = {} if pixels is None else {"pixel_values": pixels}
        alone = model.generate(
            input_ids=own_ids, attention_mask=torch.ones_like(own_ids), **inputs, **options
        )
        assert batched[sample, -8:].tolist() == alone[0, -8:].tolist()


def test_llava_next_batch_with_different_image_sizes():
    model = tiny_model("llava_next")
    sizes = torch.tensor([[20, 20], [40, 30], [15, 40]])
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, 20) for size in sizes]
    pixels = [torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(7)) for count in tiles]
    lengths = []
    for size, tile in zip(sizes, pixels, strict=True):
        features = model.model.get_image_features(
            tile[None], image_sizes=size[None], return_dict=True
        ).pooler_output
        lengths.append(len(features[0]))
    assert len(set(lengths)) > 1
    prompts = [prompt(1, 6 + index, seed=index, tokens=length) for index, length in enumerate(lengths)]
    ids, mask = pad(prompts, "left")
    padded = torch.stack(
        [torch.cat([tile, tile.new_zeros(max(tiles) - len(tile), 3, 20, 20)]) for tile in pixels]
    )
    with torch.no_grad():
        batched = model(input_ids=ids, attention_mask=mask, pixel_values=padded, image_sizes=sizes).logits
        for sample, own in enumerate(prompts):
            alone = model(
                input_ids=torch.tensor([own]),
                pixel_values=pixels[sample][None],
                image_sizes=sizes[sample][None],
            ).logits
            torch.testing.assert_close(batched[sample, mask[sample].bool()], alone[0], atol=1e-4, rtol=0)


def test_gradients_of_a_padded_batch_are_the_sum_of_the_samples():
    model = tiny_model().train()
    ids, mask = pad(PROMPTS, "right")
    labels = ids.masked_fill(mask == 0, -100).masked_fill(ids == 99, -100)

    def loss(logits, targets):
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
        )

    loss(model(input_ids=ids, attention_mask=mask, pixel_values=PIXELS).logits, labels).backward()
    batched = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    for sample, own in enumerate(PROMPTS):
        own_ids = torch.tensor([own])
        loss(
            model(input_ids=own_ids, pixel_values=own_pixels(sample)).logits,
            own_ids.masked_fill(own_ids == 99, -100),
        ).backward()
    assert all(torch.isfinite(gradient).all() for gradient in batched.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # The text-only sample alone gives the tower's unused last layer a zero gradient, the batch gives none.
            together = batched.get(name, torch.zeros_like(parameter))
            # Some gradients are zero but for rounding (a key's bias shifts all scores alike): no scale below 0.1.
            scale = max(float(parameter.grad.abs().max()), 0.1)
            torch.testing.assert_close(together / scale, parameter.grad / scale, atol=2e-4, rtol=0, msg=name)
