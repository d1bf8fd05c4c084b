"""Geometries are read without transformers and are the same that transformers' configs give."""

import copy
import subprocess
import sys

import pytest

from pmod_cli.families.defaults import MODELS, PARTS, complete, transformers_config
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.geometry import Geometry, find_geometry, shipped_geometries
from tests.common.profiling_models import tiny_raw


def asked(raw):
    """The geometry by way of transformers' own config class."""
    return Geometry.from_config(transformers_config(copy.deepcopy(raw)).to_dict())


@pytest.mark.parametrize("name", shipped_geometries())
def test_shipped_geometries(name):
    assert Geometry.from_config(find_geometry(name)["config"]) == asked(find_geometry(name)["config"])


@pytest.mark.parametrize("model", MODELS)
def test_a_config_that_says_nothing(model):
    assert Geometry.from_config({"model_type": model}) == asked({"model_type": model})


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_say_nothing(part):
    key = "vision_config" if part == "clip_vision_model" else "text_config"
    raw = {"model_type": "llava_next", key: {"model_type": part}}
    assert Geometry.from_config(raw) == asked(raw)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_token_index": None, "image_token_id": 7},
        {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"},
        {"multimodal_projector_bias": False, "tie_word_embeddings": True},
        {"text_config": {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 6}},
        {"text_config": {"model_type": "qwen2", "num_key_value_heads": None}},
    ],
)
def test_unusual_configs(changes):
    raw = {**tiny_raw(), **changes}
    raw = {key: value for key, value in raw.items() if value is not None}
    assert Geometry.from_config(raw) == asked(raw)


def test_what_a_saved_config_says_is_read_alike():
    raw = tiny_raw("llava_next")
    assert Geometry.from_config(transformers_config(raw).to_dict()) == Geometry.from_config(raw)


def test_what_is_not_a_size_is_told():
    raw = tiny_raw(text={"hidden_size": "wide"})
    with pytest.raises(PmodError, match="hidden_size of llama is 'wide'"):
        complete(raw)
    with pytest.raises(PmodError, match=r"transformers refuses the config of llava: .*hidden_size"):
        transformers_config(raw)


def test_counting_by_formula_imports_neither_torch_nor_transformers():
    code = """
import sys
from pmod_cli.cli import main
for options in (["--counter", "formula"], ["--convention", "paper"], ["--sweep", "batch"], ["--schedules"]):
    main_argv = ["profile", "llava-1.5-7b", "--json", *options]
    try:
        main(main_argv)
    except SystemExit as exit_:
        assert not exit_.code
assert not {"torch", "transformers", "fvcore"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_geometry_that_is_changed_stays_as_shipped():
    changed = find_geometry("llava-1.5-7b")["config"]
    changed["text_config"]["num_hidden_layers"] = 2
    assert find_geometry("llava-1.5-7b")["config"] != changed
