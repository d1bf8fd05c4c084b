"""MODEL is found by path, name, recipe or hub id, and its baseline is the same model without routers."""

import json

import pytest

from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.subject import find_subject
from tests.common.profiling_models import TINY_MOD, save_tiny, tiny_raw


def write(path, data):
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_config_json_of_a_dense_model_gets_the_papers_schedule(tmp_path):
    subject = find_subject(write(tmp_path / "config.json", tiny_raw()))
    assert subject.pmod.mod.retention_ratios[:2] == [None, pytest.approx(0.75)]
    assert subject.pmod.config.model_type == "pmod_llava"
    assert subject.dense.config.model_type == "llava"
    assert subject.pmod.weights is None


def test_checkpoint_folder_says_its_own_ratios(tmp_path):
    save_tiny(tmp_path, mod=TINY_MOD)
    subject = find_subject(str(tmp_path))
    assert subject.pmod.mod == TINY_MOD
    assert subject.dense.mod is None
    assert subject.pmod.weights == subject.dense.weights == str(tmp_path)


def test_folder_with_config_only_has_no_weights(tmp_path):
    write(tmp_path / "config.json", tiny_raw())
    assert find_subject(str(tmp_path)).pmod.weights is None


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"])
def test_well_known_models_offline(name):
    assert find_subject(name).pmod.geometry.decoder.hidden == 4096


def test_recipe_alone_and_with_changes():
    subject = find_subject(None, recipe="llava-next-7b", overrides=["mod.floor=0.3"])
    assert subject.pmod.config.model_type == "pmod_llava_next"
    assert min(ratio for ratio in subject.pmod.mod.retention_ratios if ratio is not None) == 0.3


@pytest.mark.parametrize("name", ["pmod-llava-1.5-7b", "llava-1.5-7b", "lora-24gb", "pmod-llava-next-7b"])
def test_recipes_by_name(name):
    for subject in (find_subject(name), find_subject(None, recipe=name)):
        assert subject.pmod.geometry.decoder.layers == 32
        assert subject.pmod.mod.retention_ratios[31] == 0.15


def test_only_what_convert_would_make():
    with pytest.raises(PmodError, match="recipe llava-next-7b is for llava_next"):
        find_subject("llava-1.5-7b", recipe="llava-next-7b")
    with pytest.raises(PmodError, match="leaves all 32 decoder layers dense"):
        find_subject(
            "llava-1.5-7b", overrides=["mod.schedule=constant", "mod.first_layer=31", "mod.last_layer=30"]
        )


def test_baseline_none_of_either_kind(tmp_path):
    dense = write(tmp_path / "dense.json", tiny_raw())
    assert list(find_subject(dense, baseline="none").variants) == ["dense"]
    routed = tiny_raw() | {"model_type": "pmod_llava", "mod": TINY_MOD.to_dict()}
    assert list(find_subject(write(tmp_path / "p.json", routed), baseline="none").variants) == ["pmod"]


def test_baseline_by_path(tmp_path):
    save_tiny(tmp_path / "dense")
    save_tiny(tmp_path / "pmod", mod=TINY_MOD)
    subject = find_subject(str(tmp_path / "pmod"), baseline=str(tmp_path / "dense"))
    assert subject.dense.weights == str(tmp_path / "dense")
    with pytest.raises(PmodError, match="p-MoD too"):
        find_subject(str(tmp_path / "dense"), baseline=str(tmp_path / "pmod"))


def test_what_cannot_be_found_names_the_nearest():
    with pytest.raises(PmodError, match=r"did you mean llava-1\.5-13b"):
        find_subject("llava-1.5-13")
    with pytest.raises(PmodError, match=r"no file or folder \./none/config\.json"):
        find_subject("./none/config.json")
    with pytest.raises(PmodError, match="name a MODEL"):
        find_subject(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "not supported"),
        ({"model_type": "pmod_llava", "mod": {"retention_ratios": [None], "nonsense": 1}}, "bad mod section"),
        ({"model_type": "pmod_llava", "mod": {"retention_ratios": [None, 0.5]}}, "2 retention ratios for 4"),
        ({"text_config": 3}, "text_config is no object"),
        ({"text_config": {"num_attention_heads": 0}}, "num_attention_heads of llama is 0, not a number"),
        ({"vision_feature_layer": {}}, "vision_feature_layer is {}, not the number of a layer"),
        ({"image_grid_pinpoints": [1, 2]}, "does not describe a model"),
    ],
)
def test_bad_configs(tmp_path, changes, message):
    with pytest.raises(PmodError, match=message):
        find_subject(write(tmp_path / "config.json", tiny_raw() | changes))


def test_unreadable_configs(tmp_path):
    with pytest.raises(PmodError, match=r"no config\.json"):
        find_subject(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(PmodError, match="cannot read"):
        find_subject(str(tmp_path))
    with pytest.raises(PmodError, match="no model_type"):
        find_subject(write(tmp_path / "other.json", {"a": 1}))


def test_recipe_on_a_model_that_is_p_mod_already(tmp_path):
    save_tiny(tmp_path, mod=TINY_MOD)
    with pytest.raises(PmodError, match="p-MoD already"):
        find_subject(str(tmp_path), recipe="llava-1.5-7b")


@pytest.mark.parametrize(
    ("kind", "message"), [("dinov2", "type 'dinov2'"), ("siglip_vision_model", "with a pooling head")]
)
def test_unsupported_tower(tmp_path, kind, message):
    raw = tiny_raw()
    raw["vision_config"] = {"model_type": kind, "image_size": 16, "patch_size": 4}
    with pytest.raises(PmodError, match=message):
        find_subject(write(tmp_path / "config.json", raw))
