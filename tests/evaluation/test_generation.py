"""Loading a checkpoint and answering prompts, alone and in batches."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from PIL import Image

from pmod_cli.generation import VisionLanguageModel, generation_settings
from pmod_cli.output.errors import PmodError
from pmod_cli.pictures import open_image
from pmod_cli.prompts import Prompt
from tests.common.eval_models import noise


@pytest.fixture(scope="module")
def model(llava):
    return VisionLanguageModel.load(llava)


@pytest.mark.parametrize("checkpoint", ["llava", "pmod", "pmod_next"])
def test_a_batch_gives_the_same_answers_as_one_by_one(checkpoint, request):
    model = VisionLanguageModel.load(request.getfixturevalue(checkpoint))
    rng = random.Random(0)
    prompts = [Prompt("What is this? " * k, tuple(noise(rng) for _ in range(k % 3))) for k in range(1, 10)]
    assert len({model.length(Prompt("x", prompt.images)) for prompt in prompts}) > (
        5 if "next" in checkpoint else 2
    )
    together = model.generate(prompts, max_new_tokens=12)
    alone = [model.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in alone}) == len(alone)


@pytest.mark.parametrize("checkpoint", ["llava", "pmod_next"])
def test_the_length_is_that_of_the_encoded_prompt(checkpoint, request):
    model = VisionLanguageModel.load(request.getfixturevalue(checkpoint))
    rng = random.Random(1)
    for count in range(3):
        prompt = Prompt("How many?", tuple(noise(rng) for _ in range(count)))
        assert model.length(prompt) == model.encode([prompt])["input_ids"].shape[1]


def test_a_literal_image_token_in_the_text_is_no_picture(model):
    answer, plain = model.generate([Prompt("what is <image>?"), Prompt("what is ?")], max_new_tokens=4)
    assert answer == plain


def test_pictures_stand_where_the_text_has_them(model):
    rng = random.Random(2)
    images = (noise(rng), noise(rng))
    asked = "Picture A: <image> Picture B: <image> Which?"
    prompt = Prompt(asked, images)
    assert asked in model.render(prompt)
    theirs = model.processor(text=f"USER: {asked} ASSISTANT:", images=list(images), return_tensors="pt")
    ours = model.encode([prompt])
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert model.length(prompt) == ours["input_ids"].shape[1]
    with pytest.raises(PmodError, match="1 <image> and 2 pictures"):
        Prompt("Here: <image>", images)


def test_new_tokens_stop_at_the_end_of_sequence_token(llava):
    model = VisionLanguageModel.load(llava)
    [free] = model.generate([Prompt("hello")], max_new_tokens=8)
    first = model.model.generate(**model.encode([Prompt("hello")]), max_new_tokens=8)[0, -8:].tolist()
    model.model.generation_config.eos_token_id = first[3]
    [stopped] = model.generate([Prompt("hello")], max_new_tokens=8)
    assert free.new_tokens == 8
    assert stopped.new_tokens == first.index(first[3]) + 1


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        (
            {"max_new_tokens": 16, "temperature": 0, "do_sample": False},
            {"max_new_tokens": 16, "do_sample": False},
        ),
        (
            {"until": ["ASSISTANT:"], "image_aspect_ratio": "original"},
            {"max_new_tokens": 1024, "do_sample": False},
        ),
        ({"top_p": 0, "num_beams": 1}, {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False}),
        (
            {"do_sample": True, "temperature": 0.2},
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.2},
        ),
    ],
)
def test_only_settings_of_transformers_are_kept(requested, expected):
    settings = generation_settings(requested)
    assert {key: value for key, value in settings.items() if value is not None} == expected


def test_errors_of_the_user_are_named(llava, tmp_path):
    with pytest.raises(PmodError, match="no checkpoint folder"):
        VisionLanguageModel.load(tmp_path / "nothing")
    with pytest.raises(PmodError, match=r"no config\.json"):
        VisionLanguageModel.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PmodError, match="not the folder"):
        VisionLanguageModel.load(tmp_path / "file")
    with pytest.raises(PmodError, match="not an image"):
        open_image(tmp_path / "file")
    with pytest.raises(PmodError, match="no image file"):
        open_image(tmp_path / "none.png")


def test_a_cut_off_picture_is_an_error(tmp_path):
    noise(random.Random(0), 64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-4000])
    assert open_image(tmp_path / "whole.png").mode == "RGB"
    with pytest.raises(PmodError, match="cannot read image"):
        open_image(tmp_path / "cut.png")


def test_an_unsupported_model_type_is_refused(llava, tmp_path):
    copy = shutil.copytree(llava, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(PmodError, match="bert"):
        VisionLanguageModel.load(copy)


def test_a_token_of_an_id_beyond_all_reason_is_refused(llava, tmp_path):
    """Saving such a tokenizer would take gigabytes, and end the process."""
    copy = shutil.copytree(llava, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[next(iter(vocabulary))] = 10**9
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PmodError, match="a token of id 1000000000"):
        VisionLanguageModel.load(copy)


def test_the_papers_release_has_to_be_converted_first(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "pmod_llava_llama"}')
    with pytest.raises(PmodError, match="pmod convert it first"):
        VisionLanguageModel.load(tmp_path)


def test_a_checkpoint_without_tokenizer_is_refused(llava, tmp_path):
    copy = shutil.copytree(llava, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(PmodError, match="has no tokenizer"):
        VisionLanguageModel.load(copy)


def test_missing_tensors_are_refused(llava, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(llava, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors.pop(next(name for name in tensors if "q_proj" in name and "language" in name))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PmodError, match="lacks 1 of the model's tensors"):
        VisionLanguageModel.load(copy)


def test_weights_that_are_no_numbers_give_no_answer(llava, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(llava, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors[next(name for name in tensors if "up_proj" in name)].fill_(float("nan"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    damaged = VisionLanguageModel.load(copy)
    with pytest.raises(PmodError, match="not a number"):
        damaged.generate([Prompt("What?")], max_new_tokens=2)


def test_truncated_weights_are_refused(llava, tmp_path):
    copy = shutil.copytree(llava, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(PmodError, match="is truncated or corrupt"):
        VisionLanguageModel.load(copy)


def test_a_palette_picture_is_read_as_rgb(tmp_path):
    Image.new("P", (8, 8)).save(tmp_path / "p.gif")
    assert open_image(tmp_path / "p.gif").mode == "RGB"
