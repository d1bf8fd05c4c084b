"""The families beside LLaVA's: what surrounds the mechanism, on tiny models with their processors and templates."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch

from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.data.batches import Collator, EncodedDataset, Example
from pmod_cli.data.records import BadSample, Conversation, Turn
from pmod_cli.families.processing import load_processor, message, picture_ids
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.output.errors import PmodError
from pmod_cli.prompts import Prompt
from pmod_cli.videos import Video
from tests.common.eval_models import noise, save_llava
from tests.common.family_models import MAKERS, QWEN_TOWER, pmod_of

RATIOS = [None, 0.75, 0.5, 0.25]
RNG = random.Random(0)
SQUARE, WIDE, TALL, SMALL = noise(RNG, 24, 20), noise(RNG, 40, 9), noise(RNG, 9, 40), noise(RNG, 8, 8)
PROMPTS = [
    Prompt("<image>\nWhat is <image> beside it?", (SQUARE, WIDE)),
    Prompt("Hello."),
    Prompt("Look!", (TALL,)),
]
VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")


class Case:
    def __init__(self, name):
        self.name = name
        self.dense, self.processor = MAKERS[name]()
        self.pmod = pmod_of(self.dense, RATIOS)
        self.image = self.dense.config.image_token_id
        self.loaded = VisionLanguageModel(self.pmod, self.processor)


@pytest.fixture(scope="module", params=MAKERS)
def case(request):
    return Case(request.param)


def test_keeping_every_token_is_the_baseline_exactly(case):
    inputs = case.loaded.encode(PROMPTS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = case.dense(**inputs).logits[real]
        found = pmod_of(case.dense, [None, 1.0, 1.0, 1.0], router_scale=0)(**inputs).logits[real]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_batched_answers_are_those_of_each_alone(case, cache):
    loaded = VisionLanguageModel(case.pmod, case.processor, cache=cache)
    together = loaded.generate(PROMPTS, max_new_tokens=5)
    assert together == [loaded.generate([prompt], max_new_tokens=5)[0] for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answer.prompt_tokens == loaded.length(prompt)


def test_answers_with_a_cache_equal_full_forward_passes(case):
    inputs = case.loaded.encode(PROMPTS)
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    special = list(case.processor.tokenizer.all_special_ids)
    ids = case.pmod.generate(**inputs, suppress_tokens=special, **options)
    longer = {**inputs, "input_ids": ids}
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in longer:
            longer[key] = torch.nn.functional.pad(longer[key], (0, 4), value=value)
    with torch.no_grad():
        logits = case.pmod(**longer).logits[:, length - 1 : -1]
    logits[..., special] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[:, length:])


@pytest.mark.parametrize("name", VIDEO)
def test_videos_are_routed_and_keep_the_baseline(name):
    case = Case(name)
    frames = np.random.default_rng(0).integers(0, 255, (4, 16, 24, 3), dtype=np.uint8)
    text = f"<|im_start|>{case.processor.video_token}ab"
    videos = [[frames]] if name == "smolvlm" else [frames]
    inputs = case.processor(text=[text], videos=videos, do_sample_frames=False, return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = case.dense(**inputs).logits
        kept_all = pmod_of(case.dense, [1.0] * 4, router_scale=0)(**inputs).logits
        output = case.pmod(**inputs, use_cache=True)
    assert torch.equal(kept_all, expected)
    tokens = torch.tensor([case.image, getattr(case.dense.config, "video_token_id", case.image)])
    vision = int(torch.isin(ids, tokens).sum())
    assert vision >= 4
    for layer, ratio in zip(output[CACHE_ARGUMENT].layers, RATIOS, strict=True):
        kept = vision if ratio is None else kept_tokens(vision, ratio)
        assert layer.keys.shape[-2] == ids.shape[1] - vision + kept


def test_pictures_become_the_processors_tokens(case):
    rng = random.Random(1)
    for _ in range(20):
        picture = noise(rng, rng.randint(4, 60), rng.randint(4, 60))
        pictures = (
            [[picture]]
            if "pixel_attention_mask" in case.processor.image_processor.model_input_names
            else [picture]
        )
        text = f"a{case.processor.image_token}b"
        ids = case.processor(text=[text], images=pictures, add_special_tokens=False)["input_ids"][0]
        assert picture_ids(case.processor, [picture.size]) == [[int(token) for token in ids[1:-1]]]


def test_tokens_follow_a_processor_that_is_changed(tmp_path):
    processor = load_processor(save_llava(tmp_path / "m", seed=0))
    [before] = picture_ids(processor, [(20, 30)])
    processor.patch_size //= 2
    [finer] = picture_ids(processor, [(20, 30)])
    processor.image_processor.crop_size = {"height": 8, "width": 8}
    [smaller] = picture_ids(processor, [(20, 30)])
    assert (len(finer), len(smaller)) == (4 * len(before), len(before))


def test_training_sees_what_prompts_see(case):
    """The encoded conversation is the processor's; its batch is the model's; the loss is the answer's alone."""
    turns = (Turn("user", "<image>\nWhat is <image>?"), Turn("assistant", "red"))
    dataset = EncodedDataset([], None, case.processor, 2048)
    encoded = dataset.encode(Conversation("a", ("x", "y"), turns), [SQUARE, WIDE])
    prompt = case.loaded.encode([Prompt(turns[0].text, (SQUARE, WIDE))])
    asked = prompt["input_ids"][0].tolist()
    assert encoded.input_ids[: len(asked)] == asked
    learned = [token for token in encoded.labels if token != -100]
    answer = case.processor.tokenizer.decode(learned)
    assert answer.removesuffix(case.processor.tokenizer.eos_token).strip() == "red"
    assert answer.endswith(case.processor.tokenizer.eos_token)
    text_only = dataset.encode(Conversation("b", (), (Turn("user", "Hi"), turns[1])), [])
    batch = Collator(case.processor)([Example("a", encoded, [SQUARE, WIDE]), Example("b", text_only, [])])
    batch.pop("notes")
    for key in prompt.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        alone = prompt[key]
        assert torch.equal(batch[key][: len(alone)], alone)
    loss = case.pmod(**batch).loss
    assert torch.isfinite(loss)
    # A padded neighbour changes nothing.
    alone = Collator(case.processor)([Example("a", encoded, [SQUARE, WIDE])])
    alone.pop("notes")
    neighbour = Collator(case.processor)([Example("b", text_only, [])])
    neighbour.pop("notes")
    counts = [int((each["labels"] != -100).sum()) for each in (alone, neighbour)]
    losses = [float(case.pmod(**each).loss.detach()) for each in (alone, neighbour)]
    assert float(loss.detach()) == pytest.approx(np.average(losses, weights=counts), rel=1e-4)


def test_a_batch_without_pictures_gets_a_blank_one(case):
    dataset = EncodedDataset([], None, case.processor, 2048)
    encoded = dataset.encode(Conversation("b", (), (Turn("user", "Hi"), Turn("assistant", "red"))), [])
    batches = [
        Collator(case.processor, image_for_text=blank)([Example("b", encoded, [])]) for blank in (True, False)
    ]
    for batch in batches:
        batch.pop("notes")
    assert (batches[0]["input_ids"] == case.image).any()
    losses = [float(case.pmod(**batch).loss.detach()) for batch in batches]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pictures_stay_among_the_words(case):
    content = message(case.processor, "user", "<image>\n<image> a <image> b</s>")["content"]
    assert [part["type"] for part in content] == ["image", "image", "text", "image", "text"]
    assert [part["text"] for part in content if "text" in part] == ["a ", " b</s>"]


def test_a_picture_too_thin_is_told(case):
    if "qwen" not in case.name:
        pytest.skip("takes every shape")
    thin = noise(RNG, 1000, 4)
    with pytest.raises(BadSample, match="unusable image"):
        EncodedDataset([], None, case.processor, 2048).encode(
            Conversation("a", ("x",), (Turn("user", "<image>"), Turn("assistant", "red"))), [thin]
        )


CLIP = Video(
    np.random.default_rng(0).integers(0, 255, (4, 16, 24, 3), dtype=np.uint8), (0, 10, 20, 30), 31, 5
)


@pytest.mark.parametrize("name", VIDEO)
def test_prompts_with_videos_and_pictures(name):
    case = Case(name)
    both = Prompt("<video> What is <image>?", (SQUARE,), videos=(CLIP,))
    prompts = [
        Prompt("Who is in <image>?", (SQUARE,)),
        Prompt("<video> What is it?", videos=(CLIP,)),
        Prompt("Hello."),
        both,
        Prompt("Is <video> after <video>?", videos=(CLIP, CLIP)),
    ]
    if name == "smolvlm":
        with pytest.raises(PmodError, match="pictures or a video in one prompt"):
            case.loaded.generate([both])
        prompts.remove(both)
    together = case.loaded.generate(prompts, max_new_tokens=3)
    assert together == [case.loaded.generate([prompt], max_new_tokens=3)[0] for prompt in prompts]
    assert [answer.prompt_tokens for answer in together] == [case.loaded.length(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("smolvlm", "four frames from a 0:00:06 .*Frame from 00:02:.*Frame from 00:06:"),
        ("qwen3_vl", "<1.0 seconds>.*<5.0 seconds>"),
    ],
)
def test_the_times_of_frames_are_those_of_the_video(name, written):
    case = Case(name)
    ids = case.loaded.encode([Prompt("What?", videos=(CLIP,))])["input_ids"][0]
    assert re.search(written, case.processor.tokenizer.decode(ids), re.DOTALL)


def test_the_seconds_between_frames_are_those_of_the_video():
    inputs = Case("qwen2_5_vl").loaded.encode([Prompt("What?", videos=(CLIP,))])
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * 31 / 5 / 4])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_pixels_of_frames_are_capped_as_in_qwens_own_code(name):
    case = Case(name)
    many = Video(np.zeros((64, 64, 64, 3), np.uint8))
    case.processor.video_processor.max_video_tokens = 4
    case.processor.video_processor.size = {"shortest_edge": 64, "longest_edge": 2**20}
    capped = case.loaded.length(Prompt("What?", videos=(many,)))
    case.processor.video_processor.cap_pixels_per_frame = False
    assert capped < case.loaded.length(Prompt("What?", videos=(many,)))


@pytest.mark.parametrize(
    ("name", "part", "key"),
    [("qwen3_vl", "vision_config", "deepstack_visual_indexes"), ("internvl", None, "downsample_ratio")],
)
def test_what_a_config_leaves_out_is_transformers_default(name, part, key, tmp_path):
    """As on the hub, where a config does not say what its class has by default."""
    dense, processor = MAKERS[name]()
    if name == "qwen3_vl":  # its default names layers 8, 16 and 24 of the tower
        config = type(dense.config)(
            **dense.config.to_dict() | {"vision_config": QWEN_TOWER | {"depth": 25, "out_hidden_size": 48}}
        )
        dense = type(dense)(config)
    for each in (dense, processor):
        each.save_pretrained(tmp_path / "dense")
    convert(plan_conversion(tmp_path / "dense"), tmp_path / "told")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    del (config[part] if part else config)[key]
    path.write_text(json.dumps(config))
    convert(plan_conversion(tmp_path / "dense"), tmp_path / "silent")
    told, silent = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("told", "silent"))
    assert told["mod"] == silent["mod"]


def test_a_model_that_takes_no_logits_to_keep_gets_all_labels(case):
    encoded = EncodedDataset([], None, case.processor, 2048).encode(
        Conversation("a", ("x",), (Turn("user", "<image> What?"), Turn("assistant", "red"))), [SQUARE]
    )
    batch = Collator(case.processor, logits_to_keep=False)([Example("a", encoded, [SQUARE])])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert "logits_to_keep" not in batch


def test_pictures_that_are_not_resized_are_counted_as_they_are(case):
    _, processor = MAKERS[case.name]()
    processor.image_processor.do_resize = False
    loaded = VisionLanguageModel(case.pmod, processor)
    for picture in (noise(RNG, 32, 32), noise(RNG, 48, 32)):
        prompt = Prompt("What?", (picture,))
        assert loaded.length(prompt) == int(loaded.encode([prompt])["attention_mask"].sum())
