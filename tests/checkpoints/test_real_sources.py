"""Folders that people really have: adapters, parts, ZeRO-3 saves, old processors, settings of their own."""

from __future__ import annotations

import json

import pytest

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.conversion.convert import convert_back
from pmod_cli.conversion.inspection import inspect_checkpoint
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.subject import find_subject
from pmod_cli.prompts import Prompt
from tests.common.checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "is a LoRA adapter, not a whole checkpoint"),
        ("mm_projector.bin", r"has only a projector \(mm_projector.bin\)"),
        ("non_lora_trainables.bin", r"has only a projector \(non_lora_trainables.bin\)"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_parts_of_a_model_are_no_checkpoint(tmp_path, name, message, with_config):
    (tmp_path / name).write_text(json.dumps({"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    uses = (
        plan_conversion,
        inspect_checkpoint,
        VisionLanguageModel.load,
        lambda folder: find_subject(str(folder)),
        lambda folder: convert_back(folder, tmp_path / "back"),
    )
    for use in uses:
        with pytest.raises(PmodError, match=message) as raised:
            use(tmp_path)
        if "adapter" in name:
            assert "lmsys/vicuna-7b-v1.5" in raised.value.hint


def rename(pattern, replacement):
    def change(tensors):
        for name in [name for name in tensors if pattern in name]:
            new = name.replace(pattern, replacement, 1)
            tensors[new] = tensors.pop(name).renamed(new)

    return change


@pytest.mark.parametrize(
    "change",
    [
        rename("q_proj.", "q_proj.lora_A.default."),
        rename("language_model.", "base_model.model.language_model."),
    ],
)
def test_layers_that_peft_has_not_merged(tmp_path, change):
    with pytest.raises(PmodError, match="unmerged LoRA"):
        plan_conversion(make_checkpoint(tmp_path / "source", change=change))


@pytest.mark.parametrize(
    "part",
    [
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "patch_embedding.weight",
        "mlp.fc1",
        "layer_norm1.bias",
        "input_layernorm",
    ],
)
def test_empty_tensors_of_zero_3(tmp_path, part):
    def empty(tensors):
        hit = [name for name in tensors if part in name]
        assert hit
        tensors.update({name: StoredTensor.zeros(name, "BF16", (0,)) for name in hit})

    source = make_checkpoint(tmp_path / "source", change=empty)
    for use in (plan_conversion, VisionLanguageModel.load):
        with pytest.raises(PmodError, match=r"has shape \[0\]"):
            use(source)


def test_a_head_that_is_not_there_and_not_tied(tmp_path):
    source = make_checkpoint(
        tmp_path / "source", change=lambda tensors: tensors.pop("language_model.lm_head.weight")
    )
    config = json.loads((source / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(PmodError, match=r"the weights lack lm_head\.weight"):
        plan_conversion(source)


def edited(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_what_an_old_processor_lacks_is_the_models(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    lacking = dict.fromkeys(("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"))
    whole = VisionLanguageModel.load(source).processor
    edited(source, "processor_config.json", **lacking)
    filled = VisionLanguageModel.load(source).processor
    assert [getattr(filled, name) for name in lacking] == [getattr(whole, name) for name in lacking]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"image_token_index": 7}, "id of the token <image>: 4 and 7"),
        ("config.json", {"image_token_index": 10_000}, "id of the token <image>: 4 and 10000"),
        ("config.json", {"image_token_index": None}, "id of the token <image>"),
        ("processor_config.json", {"patch_size": 14}, "patch_size: 14 and 8"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
    ],
)
def test_model_and_processor_that_do_not_belong_together(tmp_path, file, changes, message):
    source = make_checkpoint(tmp_path / "source")
    edited(source, file, **changes)
    for use in (VisionLanguageModel.load, plan_conversion):
        with pytest.raises(PmodError, match=message):
            use(source)


def test_weights_without_a_processor_can_be_converted(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    (source / "processor_config.json").unlink()
    assert "no processor could be loaded" in plan_conversion(source).translation.notes[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 5.0},
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1},
        {"max_length": 20, "min_new_tokens": 12},
        {"eos_token_id": None, "pad_token_id": None},
        {"suppress_tokens": [2], "forced_bos_token_id": 5, "guidance_scale": 2.0},
        {"return_dict_in_generate": True, "use_cache": False, "stop_strings": ["red"]},
    ],
)
def test_a_checkpoints_generation_settings_do_not_count(tmp_path, settings):
    source = make_checkpoint(tmp_path / "source")
    prompt = [Prompt("What colour is the sky?")]
    expected = VisionLanguageModel.load(source).generate(prompt, max_new_tokens=12)
    edited(source, "generation_config.json", **settings)
    assert VisionLanguageModel.load(source).generate(prompt, max_new_tokens=12) == expected


@pytest.mark.parametrize("value", [True, -1, 1e300, [2, "x"], 10**30])
def test_ids_that_end_an_answer_are_ids(tmp_path, value):
    source = make_checkpoint(tmp_path / "source")
    edited(source, "generation_config.json", eos_token_id=value)
    with pytest.raises(PmodError, match=r"eos_token_id is .* not the id of a token"):
        VisionLanguageModel.load(source)
