"""Everything `generate` can do: beams, sampling, several answers, streaming, stop strings, assistants, chunks."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DynamicCache, PreTrainedTokenizerFast, TextStreamer

from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import IMAGE, pad, pictures, prompt, tiny_model

IDS, PIXELS = torch.tensor([prompt(1, 10)]), pictures(1)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "pixel_values": PIXELS}
OPTIONS = {"max_new_tokens": 8, "eos_token_id": None, "suppress_tokens": [IMAGE]}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def greedy_by_hand(model, ids, pixels, steps, attention_mask=None):
    """Greedy decoding by full forward passes without a cache; the image is routed anew each time."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, -1]
        logits[:, IMAGE] = -float("inf")
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def test_greedy_equals_full_forward_passes(model):
    assert torch.equal(
        model.generate(**INPUTS, **OPTIONS, do_sample=False), greedy_by_hand(model, IDS, PIXELS, 8)
    )


def test_beam_search_with_one_sample_and_with_a_padded_batch(model):
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    prompts = [prompt(1, 5, seed=3), prompt(2, 4, seed=4), prompt(0, 6, seed=5)]
    ids, mask = pad(prompts, "left")
    pixels = pictures(3)
    batched = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)
    assert batched.shape == (6, ids.shape[1] + 8)
    start = 0
    for sample, own in enumerate(prompts):
        count = own.count(IMAGE) // 25
        own_ids = torch.tensor([own])
        inputs = {"pixel_values": pixels[start : start + count]} if count else {}
        alone = model.generate(
            input_ids=own_ids, attention_mask=torch.ones_like(own_ids), **inputs, **options
        )
        start += count
        assert batched[2 * sample : 2 * sample + 2, -8:].tolist() == alone[:, -8:].tolist()


def test_sampling_is_reproducible_and_returns_several(model):
    options = {**OPTIONS, "do_sample": True, "temperature": 1.5, "num_return_sequences": 4}
    torch.manual_seed(0)
    first = model.generate(**INPUTS, **options)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(**INPUTS, **options))
    assert len({tuple(row) for row in first.tolist()}) > 1


class Words:
    """The least of a tokenizer that streaming needs."""

    def decode(self, ids, **_):
        return " ".join(f"w{int(token)}" for token in ids)


def test_streamer(model, capsys):
    expected = model.generate(**INPUTS, **OPTIONS, do_sample=False)[0, -8:].tolist()
    model.generate(**INPUTS, **OPTIONS, do_sample=False, streamer=TextStreamer(Words(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [f"w{token}" for token in expected]


def test_assisted_decoding_gives_the_same_tokens(model):
    expected = model.generate(**INPUTS, **OPTIONS, do_sample=False)
    looked_up = model.generate(**INPUTS, **OPTIONS, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, expected)


def test_assistant_model_gives_the_same_tokens(model):
    """A smaller p-MoD model proposes; what is rejected is cropped from both caches."""
    assistant = tiny_model(seed=1, mod=MoDConfig([None, 0.5, 0.25]), num_hidden_layers=3)
    expected = model.generate(**INPUTS, **OPTIONS, do_sample=False)
    assisted = model.generate(**INPUTS, **OPTIONS, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, expected)


def test_stop_strings(model):
    """A real tokenizer of one word an id: generation ends behind the third new word."""
    vocabulary = {f"w{token}": token for token in range(99)}
    vocabulary["abcdef"] = 99  # transformers looks how words are joined behind this one
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", pad_token="w0")
    start = IDS.shape[1]
    words = model.generate(**INPUTS, **OPTIONS, do_sample=False)[0, start:].tolist()
    stop = f"w{words[2]}"
    first = [f"w{word}" for word in words].index(stop)
    stopped = model.generate(**INPUTS, **OPTIONS, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped[0, start:].tolist() == words[: first + 1]


def test_output_routing_is_for_forward_passes(model):
    with pytest.raises(ValueError, match="output_routing"):
        model.generate(**INPUTS, **OPTIONS, output_routing=True)


def test_second_image_in_the_second_turn_through_generate(model):
    """`generate` on the first turn's cache equals the same forward passes by hand."""
    cache, by_hand = DynamicCache(), DynamicCache()
    options = {**OPTIONS, "do_sample": False, "max_new_tokens": 4}
    first = model.generate(**INPUTS, **{CACHE_ARGUMENT: cache}, **options)
    turn = torch.tensor([prompt(1, 5, seed=7)])
    whole = torch.cat([first, turn], dim=1)
    second = model.generate(
        input_ids=whole,
        attention_mask=torch.ones_like(whole),
        pixel_values=pictures(1, seed=5),
        **{CACHE_ARGUMENT: cache},
        **options,
    )
    start = IDS.shape[1]
    chunks = [(IDS, PIXELS)] + [(first[:, i : i + 1], None) for i in range(start, first.shape[1] - 1)]
    chunks.append((torch.cat([first[:, -1:], turn], dim=1), pictures(1, seed=5)))
    produced = []
    with torch.no_grad():
        for ids, pixels in chunks:
            inputs = {} if pixels is None else {"pixel_values": pixels}
            logits = model(input_ids=ids, **inputs, **{CACHE_ARGUMENT: by_hand}).logits
        for _ in range(4):
            logits[..., IMAGE] = -float("inf")
            produced.append(logits[:, -1:].argmax(-1))
            logits = model(input_ids=produced[-1], **{CACHE_ARGUMENT: by_hand}).logits
    assert torch.equal(second[:, -4:], torch.cat(produced, dim=1))
    slots = [layer.keys.shape[-2] for layer in cache.layers]
    # `generate` does not run the last token it produced; the loop above did.
    assert [slot + 1 for slot in slots] == [layer.keys.shape[-2] for layer in by_hand.layers]
    assert slots[0] == cache.get_seq_length() > slots[-1]


def test_continuing_a_conversation_on_its_cache(model):
    cache = DynamicCache()
    options = {**OPTIONS, "do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 4}
    first = model.generate(**INPUTS, **{CACHE_ARGUMENT: cache}, **options).sequences
    # The last generated token is not in the cache yet; the second turn brings it, and text.
    second = torch.cat([first, torch.tensor([[11, 12, 13]])], dim=1)
    assert cache.get_seq_length() == first.shape[1] - 1
    continued = model.generate(
        input_ids=second, attention_mask=torch.ones_like(second), **{CACHE_ARGUMENT: cache}, **options
    ).sequences
    assert torch.equal(continued, greedy_by_hand(model, second, PIXELS, 4))


def test_image_token_made_by_the_model_itself_is_text(model):
    """A generated image token has no image behind it: it must not be routed."""
    cache = DynamicCache()
    with torch.no_grad():
        model(**INPUTS, **{CACHE_ARGUMENT: cache})
        slots = [layer.keys.shape[-2] for layer in cache.layers]
        routed = model(
            input_ids=torch.tensor([[IMAGE]]), **{CACHE_ARGUMENT: cache}, output_routing=True
        ).routing
    assert routed == (None,) * 8
    assert [layer.keys.shape[-2] for layer in cache.layers] == [slot + 1 for slot in slots]


def merged(model, ids, pixels):
    """Embeddings with the image features written in, as a caller may prepare them."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        features = torch.cat(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))
    return embeds.masked_scatter((ids == IMAGE)[..., None], features)


@pytest.mark.parametrize("beams", [1, 3])
def test_merged_embeddings_are_routed_in_generate_too(model, beams, caplog):
    """With ``vision_mask`` the prefill is the one of ids and pictures, left-padded and with beams; else a warning."""
    # One picture a sample at most: transformers 5.17 mixes up the pictures of a sample's beams.
    ids, mask = pad([prompt(1, 5, seed=3), prompt(1, 9, seed=4), prompt(0, 6, seed=5)], "left")
    pixels = pictures(2)
    options = {**OPTIONS, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True}
    expected = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)
    inputs = {"inputs_embeds": merged(model, ids, pixels), "attention_mask": mask}
    made = model.generate(**inputs, vision_mask=ids == IMAGE, **options)
    assert torch.equal(made.sequences, expected.sequences[:, ids.shape[1] :])
    slots = [[layer.keys.shape[-2] for layer in output[CACHE_ARGUMENT].layers] for output in (made, expected)]
    assert slots[0] == slots[1]
    assert slots[0][-1] < slots[0][0]
    assert not caplog.records
    dense = model.generate(**inputs, **options)
    assert "all tokens are taken for text" in caplog.text
    assert len({layer.keys.shape[-2] for layer in dense[CACHE_ARGUMENT].layers}) == 1


def test_a_vision_mask_of_other_tokens_is_an_error(model):
    with pytest.raises(ValueError, match=r"vision_mask is \[1, 3\] for tokens \[1, \d+\]"):
        model(input_ids=IDS, vision_mask=torch.zeros(1, 3, dtype=torch.bool))


def test_a_vision_mask_without_a_cache(model):
    """Every step is a full forward pass; what was generated is text."""
    options = {**OPTIONS, "do_sample": False, "use_cache": False}
    routed = model.generate(**INPUTS, **options)
    assert torch.equal(model.generate(**INPUTS, vision_mask=IDS == IMAGE, **options), routed)
