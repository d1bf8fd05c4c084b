"""LLaVA-OneVision through the same seam: images in tiles, several images, videos, and all of them in one batch."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from pmod_cli.cli import main
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.schedule import kept_tokens, shifted_cosine
from pmod_cli.modeling.settings import MoDConfig
from tests.common.onevision_models import (
    IMAGE,
    LAYERS,
    VIDEO,
    dense_model,
    picture,
    pmod_model,
    processor,
    raw_config,
    video,
)

WIDE, TALL, SQUARE = picture(31, 12, seed=1), picture(11, 40, seed=2), picture(39, 39, seed=3)
PROMPTS = {
    "image": {"text": "w5 <image> w6 w7", "images": [WIDE]},
    "shrunk": {"text": "w8 <image> w9", "images": [SQUARE]},
    "images": {"text": "w5 <image> w6 <image> w7", "images": [[WIDE, TALL]]},
    "video": {"text": "w10 <video> w11 w12 w13", "videos": [video(5)]},
    "both": {"text": "w5 <image> w6 <video> w7 w8", "images": [TALL], "videos": [video(2, seed=4)]},
    "text": {"text": "w14 w15 w16 w17"},
}


def inputs(name):
    return dict(processor()(**PROMPTS[name], return_tensors="pt"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PROMPTS)
def test_keeping_every_token_is_the_baseline(name, attention):
    dense, model = dense_model(), pmod_model(MoDConfig([None] + [1.0] * (LAYERS - 1)))
    for parameter_name, parameter in model.named_parameters():
        if ".router." in parameter_name:
            parameter.data.zero_()
    for one in (dense, model):
        one.set_attn_implementation(attention)
    with torch.no_grad():
        expected, found = dense(**inputs(name)), model(**inputs(name))
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("name", ["image", "images", "video", "both"])
def test_images_and_videos_are_routed(name):
    model, prompt = pmod_model(), inputs(name)
    with torch.no_grad():
        output = model(**prompt, use_cache=True, output_routing=True)
    vision = torch.isin(prompt["input_ids"], torch.tensor([IMAGE, VIDEO]))
    count, text = int(vision.sum()), int((~vision).sum())
    cache = output[CACHE_ARGUMENT]
    for layer, ratio in enumerate(model.model.mod.retention_ratios):
        expected = text + (count if ratio is None else kept_tokens(count, ratio))
        assert cache.layers[layer].keys.shape[-2] == expected
        if ratio is not None:
            assert output.routing[layer].kept[~vision].all()
            assert int(output.routing[layer].kept.sum()) == expected


def test_batched_equals_one_by_one():
    # One image a sample, as transformers pairs batch_num_images with pixel values; videos of one length.
    names = ["image", "both", "shrunk", "text"]
    texts = [PROMPTS[name]["text"] for name in names]
    images = [image for name in names for image in PROMPTS[name].get("images", ())]
    batch = dict(
        processor()(
            text=texts, images=images, videos=PROMPTS["both"]["videos"], padding=True, return_tensors="pt"
        )
    )
    model = pmod_model()
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        together = model(**batch)
        tokens = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        for row, name in enumerate(names):
            alone = model(**inputs(name))
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together.logits[row, real], alone.logits[0], atol=1e-4, rtol=0)
            own = model.generate(**inputs(name), **options)[0, alone.logits.shape[1] :]
            assert torch.equal(tokens[row, : len(own)], own)


@pytest.mark.parametrize("name", ["both", "images"])
def test_generation_with_cache_equals_without(name):
    model, prompt = pmod_model(), inputs(name)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    with_cache = model.generate(**prompt, **options)
    ids = prompt.pop("input_ids")
    for _ in range(8):
        with torch.no_grad():
            # Only the prompt's own tokens are routed; what is generated is text.
            prompt["attention_mask"] = torch.ones_like(ids)
            logits = model(input_ids=ids, **prompt, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(with_cache, ids)


def test_high_resolution_tokens_only():
    model = pmod_model(MoDConfig(shifted_cosine(LAYERS), target_tokens="vision_hr"))
    for name in ("image", "images", "video", "both"):
        prompt = inputs(name)
        ids = prompt["input_ids"][0]
        expected = ids == VIDEO
        image = ids == IMAGE
        # Behind the tile of 9; of several images, each of them one tile and a newline, all.
        expected |= image & ((image.cumsum(0) > 9) | torch.tensor(name == "images"))
        with torch.no_grad():
            routing = model(**prompt, output_routing=True).routing[LAYERS - 1]
        assert torch.equal(routing.weights[0] != 1, expected), name


def test_wrong_numbers_are_told_by_kind():
    model, prompt = pmod_model(), inputs("both")
    prompt["input_ids"][0, -1] = VIDEO
    with pytest.raises(ValueError, match="Video features and video tokens do not match, tokens: 10"):
        model(**prompt)


def test_save_and_load_with_the_processor(tmp_path):
    model = pmod_model()
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded, read = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert type(loaded) is type(model)
    prompt = read(**PROMPTS["both"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**prompt).logits, model(**inputs("both")).logits)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A dense checkpoint and what ``pmod convert`` makes of it."""
    base = tmp_path_factory.mktemp("onevision")
    dense_model().save_pretrained(base / "dense")
    processor().save_pretrained(base / "dense")
    with pytest.raises(SystemExit) as done:
        main(["convert", str(base / "dense"), str(base / "pmod")])
    assert done.value.code == 0
    return base


def test_conversion(converted):
    model = AutoModelForImageTextToText.from_pretrained(converted / "pmod").eval()
    assert model.config.model_type == "pmod_llava_onevision"
    assert model.model.mod.retention_ratios == shifted_cosine(LAYERS)
    dense = dense_model().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.zeros_like(value) if ".router." in name else dense[name])
    prompt = AutoProcessor.from_pretrained(converted / "pmod")(**PROMPTS["both"], return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3


@pytest.mark.parametrize("size", ["31x12", "39x39"])
def test_profile_of_the_converted_checkpoint(converted, size):
    from tests.common.profiling_models import profile_checkpoint

    options = {"counter": "fvcore", "image_size": size, "dtype": "float32", "new_tokens": 3, "batch": 2}
    result = profile_checkpoint(converted / "pmod", latency=True, repeats=1, device="cpu", **options)
    assert result["checks"] == {"formula": True}
    assert not result["latency"]["random_weights"]
    for role, measured in result["latency"]["models"].items():
        assert measured["kv_cache"] == result[role]["kv_cache"]
    assert result["ratios"]["kv_prefill"] < 1


def test_a_decoder_of_another_family(tmp_path, capsys):
    raw = raw_config()
    raw["text_config"]["model_type"] = "gemma2"
    folder = tmp_path / "source"
    dense_model().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SystemExit) as done:
        main(["convert", str(folder), str(tmp_path / "out")])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert "'gemma2' is not supported in llava_onevision (supported: qwen2)" in error


def test_each_of_several_pictures_is_one_tile_in_training_and_in_prompts():
    from pmod_cli.data.batches import Collator, Example
    from pmod_cli.data.chat import Encoded
    from pmod_cli.families.processing import picture_ids
    from pmod_cli.generation import VisionLanguageModel
    from pmod_cli.prompts import Prompt

    loaded = VisionLanguageModel(pmod_model(), processor())
    pictures = picture_ids(loaded.processor, [WIDE.size, TALL.size])
    assert pictures == [[IMAGE] * 10] * 2  # nine patches and a newline
    ids = [*pictures[0], *pictures[1], 5]
    batch = Collator(loaded.processor)([Example("a", Encoded(ids, [-100] * 20 + [5]), [WIDE, TALL])])
    batch.pop("notes")
    assert torch.isfinite(loaded.model(**batch).loss)
    prompt = Prompt("w5 <image> w6 <image> w7", (WIDE, TALL))
    inputs = loaded.encode([prompt, Prompt("w8", (SQUARE,))])
    assert int((inputs["input_ids"][0] == IMAGE).sum()) == 20
    assert loaded.length(prompt) == int(inputs["attention_mask"][0].sum())
    [answer, _] = loaded.generate([prompt, Prompt("w8", (SQUARE,))], max_new_tokens=3)
    assert loaded.generate([prompt], max_new_tokens=3) == [answer]
