"""A LLaVA put together of a language model, a vision tower and a projector, and its tokenizer."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from pmod_cli.checkpoints.source import open_source
from pmod_cli.cli import main
from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.formats import Options, find_format
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import load_recipe
from tests.common.parts_checkpoints import PIECES, save_parts, sentencepiece_model


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece_model()


@pytest.fixture(scope="module", params=[False, True], ids=["vicuna's tokenizer", "legacy tokenizer"])
def parts(request, tmp_path_factory, pieces):
    return save_parts(tmp_path_factory.mktemp("parts"), pieces, legacy=request.param)


def options(parts, **changes):
    _, _, clip, stage1 = parts
    return Options(**{"allow_pickle": True, "vision_tower": str(clip), "projector": str(stage1), **changes})


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled") / "pmod"
    done = convert(plan_conversion(parts[1], options=options(parts)), folder)
    assert (done["format"], done["family"]) == ("parts", "llava")
    return folder


def test_every_weight_is_its_parts(parts, assembled):
    model = parts[0]
    result, info = AutoModelForImageTextToText.from_pretrained(
        assembled, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = result.state_dict()
    for name, value in model.state_dict().items():
        if "embed_tokens" in name or name == "lm_head.weight":
            assert torch.equal(ours[name][:PIECES], value)
            torch.testing.assert_close(ours[name][PIECES:], value.mean(0).expand(34, -1))
        else:
            assert torch.equal(ours[name], value.half().float() if "projector" in name else value), name
    assert result.config.image_token_id == PIECES
    assert result.config.text_config.vocab_size == 384


def test_processor_expands_an_image_and_pads_it(parts, assembled):
    processor = AutoProcessor.from_pretrained(assembled)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=Image.new("RGB", (40, 10), "white"), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == PIECES).sum() == 25
    # Padded to a square with the mean colour, which is zero after normalisation; cropping would leave white.
    assert inputs["pixel_values"][0, :, 0].abs().max() < 0.02
    assert processor.tokenizer.pad_token_id == 0
    assert processor.tokenizer.padding_side == "left"
    model = AutoModelForImageTextToText.from_pretrained(assembled, dtype=torch.float32)
    assert (
        model.generate(**inputs, max_new_tokens=3, eos_token_id=None).shape[1]
        == inputs["input_ids"].shape[1] + 3
    )
    assert model.generation_config.do_sample in (None, False)


def test_text_around_an_image_is_tokenised_as_by_llava(parts, assembled, pieces):
    """LLaVA gives the text on each side of an image to sentencepiece by itself; the template leads to the same ids."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    tokenizer = AutoTokenizer.from_pretrained(assembled)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    before, after = prompt.split("<image>")
    expected = [1, *spm.encode(before), PIECES, *spm.encode("\n" + after.split("\n", 1)[1])]
    assert tokenizer(prompt)["input_ids"] == expected
    assert before.endswith("USER: ")
    assert after.endswith("\nWhat is in the image? ASSISTANT:")


def test_generate_as_typed(assembled, tmp_path, capsys):
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    words = [
        "generate",
        str(assembled),
        "--image",
        str(tmp_path / "red.png"),
        "--prompt",
        "What is in the image?",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--max-new-tokens", "4", "--json"])
    printed = capsys.readouterr()
    assert stopped.value.code == 0, printed.err
    tokenizer = AutoTokenizer.from_pretrained(assembled)
    template = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    template += "detailed, and polite answers to the user's questions. USER: "
    text = len(tokenizer(template)["input_ids"]) + len(
        tokenizer("\nWhat is in the image? ASSISTANT:", add_special_tokens=False)["input_ids"]
    )
    # One beginning-of-sequence token, and the sentencepiece blank behind the image.
    assert json.loads(printed.out)["result"]["prompt_tokens"] == text + 25


def test_llava_next_gets_its_newline_and_grids(parts, tmp_path):
    plan = plan_conversion(parts[1], options=options(parts), recipe=load_recipe("pmod-llava-next-7b"))
    assert any("image_newline" in note for note in plan.translation.notes)
    convert(plan, tmp_path / "pmod")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "pmod", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.image_grid_pinpoints == [[40, 20], [20, 40], [40, 40], [20, 60], [60, 20]]
    assert model.model.image_newline.std().item() == pytest.approx(32**-0.5, rel=0.5)
    processor = AutoProcessor.from_pretrained(tmp_path / "pmod")
    inputs = processor(images=Image.new("RGB", (40, 30)), text="<image>\nWhat?", return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_a_recipe_names_the_parts(parts, tmp_path, capsys):
    _, vicuna, clip, stage1 = parts
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"source: {{language_model: x, vision_tower: {clip}, projector: {stage1 / 'mm_projector.bin'}}}"
    )
    words = [
        "convert",
        str(vicuna),
        str(tmp_path / "pmod"),
        "--recipe",
        str(recipe),
        "--allow-pickle",
        "--json",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["result"]["format"] == "parts"


def test_a_tokenizer_that_has_the_image_token_already(assembled, parts):
    # The converted checkpoint's own tokenizer.json, where the language model has none.
    vicuna = open_source(parts[1])
    plan = plan_conversion(vicuna.folder, options=options(parts, tokenizer=str(assembled)))
    assert plan.translation.config["image_token_index"] == PIECES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_tower": None}, "is a language model alone"),
        ({"projector": None}, "is a language model alone"),
        ({"allow_pickle": False}, "--allow-pickle"),
        ({"projector": "{clip}"}, "has no mm_projector.safetensors or mm_projector.bin"),
        ({"projector": "{clip}/pytorch_model.bin"}, "is no mlp2x_gelu projector"),
        ({"vision_tower": "{vicuna}"}, "only CLIP towers"),
        ({"tokenizer": "{clip}"}, "has no tokenizer"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(parts, changes, message):
    _, vicuna, clip, _ = parts
    filled = {
        key: value.format(vicuna=vicuna, clip=clip) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(PmodError) as caught:
        plan_conversion(vicuna, options=options(parts, **filled))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_projector_of_another_width(parts, tmp_path):
    narrow = {"0.weight": (32, 8), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    tensors = {f"mm_projector.{name}": torch.zeros(shape) for name, shape in narrow.items()}
    save_file(tensors, tmp_path / "mm_projector.safetensors")
    with pytest.raises(PmodError, match=r"linear_1.weight has shape \[32, 8\]"):
        plan_conversion(parts[1], options=options(parts, projector=str(tmp_path)))


def test_formats_are_told_apart(parts):
    assert find_format(open_source(parts[1])) == "parts"
    assert LlavaForConditionalGeneration.config_class is LlavaConfig
