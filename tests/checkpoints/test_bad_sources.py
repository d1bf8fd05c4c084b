"""What is wrong with a source is said in one line, and nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest

from pmod_cli.checkpoints.load import check_source, check_weights, read_config, refuse_part
from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.demo.job import BASELINE
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import load_recipe, parse_recipe
from tests.common.checkpoints import HIDDEN, make_checkpoint

TEXT = json.loads((BASELINE / "config.json").read_text())["text_config"]
LAYER = "language_model.model.layers.3."


def reshape(name, *shape):
    def change(tensors):
        tensors[name] = StoredTensor.zeros(name, "BF16", shape)

    return change


def without(*endings):
    def change(tensors):
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reshape(LAYER + "mlp.up_proj.weight", 256, 95), r"layers\.3\.mlp\.up_proj.*its hidden_size is 95"),
        (
            reshape(LAYER + "self_attn.k_proj.weight", 48, HIDDEN),
            "its key width is 48, and 96 by config",
        ),
        (reshape(LAYER + "input_layernorm.weight", HIDDEN, 1), "1 sides are expected"),
        (reshape("language_model.model.embed_tokens.weight", 400, HIDDEN), "its vocab_size is 400"),
        (reshape("language_model.lm_head.weight", 396, HIDDEN), "its vocab_size is 396"),
        (reshape("multi_modal_projector.linear_1.weight", 64, HIDDEN), "its hidden_size is 64"),
        (reshape("multi_modal_projector.linear_1.weight", HIDDEN, 64), "its features is 64, and 96"),
        (reshape("vision_tower.embeddings.class_embedding", 64), "its vision hidden_size is 64"),
        (
            reshape("vision_tower.encoder.layers.1.mlp.fc1.weight", 7, HIDDEN),
            r"fc1\.weight has shape \[7, 96\], and",
        ),
        (without(LAYER + "self_attn.q_proj.weight"), r"lack language_model.model.layers.3.self_attn.q_proj"),
        (without("lm_head.weight"), "lack lm_head.weight"),
        (
            without("encoder.layers.1.mlp.fc1.weight"),
            r"lack vision_tower\.encoder\.layers\.1\.mlp\.fc1\.weight",
        ),
        (without("linear_2.weight"), r"lack multi_modal_projector.linear_2.weight"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.7." in name],
            r"have 7 decoder layers, and config\.json.* says 8",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "language_model.model" in name],
            "no decoder layers",
        ),
        (reshape(LAYER[:-2] + "0.self_attn.q_proj.weight", HIDDEN, HIDDEN), None),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    source = make_checkpoint(tmp_path / "source", change=change)
    if message is None:
        plan_conversion(source)
        return
    with pytest.raises(PmodError, match=message):
        plan_conversion(source)


def test_sizes_that_the_config_leaves_out_are_transformers_defaults(tmp_path):
    """Hub configs leave out what is a default of the model type."""
    silent = {"num_key_value_heads": None, "head_dim": None}
    source = make_checkpoint(tmp_path / "source", config={"text_config": TEXT | silent})
    assert plan_conversion(source).layout.layers == 8
    text = {"model_type": "llama", "vocab_size": 397, "num_hidden_layers": 8}
    other = make_checkpoint(tmp_path / "other", config={"text_config": text})
    with pytest.raises(PmodError, match=r"hidden_size is 96, and 4096 by config\.json"):
        plan_conversion(other)
    del text["num_hidden_layers"]
    fewer = make_checkpoint(tmp_path / "fewer", config={"text_config": text})
    with pytest.raises(PmodError, match=r"have 8 decoder layers, and config\.json.* says 32"):
        plan_conversion(fewer)


@pytest.mark.parametrize("which", ["_proj.weight", "mlp.up_proj.weight"])
def test_quantised_weights(tmp_path, which):
    def pack(tensors):
        for name in tensors:
            if name.endswith(which) and "language_model" in name:
                tensors[name] = StoredTensor.zeros(name, "I8", tensors[name].shape)

    with pytest.raises(PmodError, match="quantised"):
        plan_conversion(make_checkpoint(tmp_path / "source", change=pack))
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(PmodError, match="quantised"):
        plan_conversion(make_checkpoint(tmp_path / "again", config=config))


def test_shards_that_are_absent_or_broken(tmp_path):
    source = make_checkpoint(tmp_path / "source", shards=3)
    shard, index = source / "model-00002-of-00003.safetensors", source / "model.safetensors.index.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(PmodError, match=r"model-00002-of-00003.safetensors is truncated"):
        plan_conversion(source)
    shard.unlink()
    with pytest.raises(PmodError, match=r"names model-00002-of-00003.safetensors, which is not in"):
        plan_conversion(source)
    shard.write_bytes(whole)
    data = json.loads(index.read_text())
    moved = next(name for name, file in data["weight_map"].items() if file == shard.name)
    index.write_text(
        json.dumps({"weight_map": {**data["weight_map"], moved: "model-00001-of-00003.safetensors"}})
    )
    with pytest.raises(PmodError, match="and it is not"):
        plan_conversion(source)
    for file in ("../model.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {moved: file}}))
        with pytest.raises(PmodError, match="not a file of its own folder"):
            plan_conversion(source)
    for text in ("{}", '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(PmodError, match="has no weight_map"):
            plan_conversion(source)
    index.write_text("{")
    with pytest.raises(PmodError, match="cannot read"):
        plan_conversion(source)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(PmodError, match="no folder"):
        plan_conversion(tmp_path / "none")
    with pytest.raises(PmodError, match="HF_HUB_OFFLINE is set"):
        plan_conversion("nobody/nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(PmodError, match="is a file"):
        plan_conversion(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PmodError, match=r"known format.*no config.json"):
        plan_conversion(tmp_path / "empty")
    source = make_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    with pytest.raises(PmodError, match="has no weights"):
        plan_conversion(source)
    (source / "config.json").write_text("[]")
    with pytest.raises(PmodError, match="not a JSON object"):
        plan_conversion(source)


def test_models_that_are_not_supported(tmp_path):
    source = make_checkpoint(tmp_path / "blip", config={"model_type": "blip-2"})
    with pytest.raises(PmodError, match=r"'blip-2' is not supported.*llava, llava_next"):
        plan_conversion(source)
    source = make_checkpoint(tmp_path / "gemma", config={"text_config": {"model_type": "gemma2"}})
    with pytest.raises(PmodError, match=r"'gemma2' is not supported in llava.*llama, mistral, qwen2"):
        plan_conversion(source)
    window = {"model_type": "mistral", "sliding_window": 4096}
    source = make_checkpoint(tmp_path / "window", config={"text_config": window})
    with pytest.raises(PmodError, match="sliding window of 4096"):
        plan_conversion(source)
    silent = make_checkpoint(tmp_path / "silent", config={"text_config": {"model_type": "mistral"}})
    with pytest.raises(PmodError, match="sliding window of 4096"):  # transformers' default
        plan_conversion(silent)
    none = TEXT | {"model_type": "mistral", "sliding_window": None}
    plan_conversion(make_checkpoint(tmp_path / "none", config={"text_config": none}))


def test_recipes_that_do_not_fit(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    with pytest.raises(PmodError, match="is for llava_next, and the source is llava"):
        plan_conversion(source, recipe=load_recipe("llava-next-7b"))
    for mod, message in (
        ({"floor": 0.0}, r"layer 7 is 0, outside \(0, 1\]"),
        ({"schedule": "explicit", "ratios": [0.5] * 7}, "7 retention ratios for 8 decoder layers"),
        ({"schedule": "explicit", "ratios": [None] * 8}, "leaves all 8 decoder layers dense"),
        ({"shift": 1.0, "ceiling": 0.15}, "leaves all|outside"),
    ):
        with pytest.raises(PmodError, match=message):
            plan_conversion(source, recipe=parse_recipe({"name": "mine", "mod": mod}))
    for ratio in (0, -0.5, 1.5):
        with pytest.raises(PmodError, match=r"outside \(0, 1\]|less than|greater than"):
            parse_recipe({"name": "mine", "mod": {"schedule": "explicit", "ratios": [ratio]}})


def test_a_decoder_of_one_layer(tmp_path):
    def cut(tensors):
        for name in list(tensors):
            if "language_model" in name and ".layers." in name and ".layers.0." not in name:
                del tensors[name]

    config = {"text_config": TEXT | {"num_hidden_layers": 1}}
    source = make_checkpoint(tmp_path / "source", change=cut, config=config)
    with pytest.raises(PmodError, match="at least 2 decoder layers, not 1"):
        plan_conversion(source)


def test_a_folder_without_weights_says_where_they_are(tmp_path):
    shutil.copytree(BASELINE, tmp_path / "part", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(PmodError, match=r"has no weights \(expected model.safetensors"):
        VisionLanguageModel.load(tmp_path / "part")
    (tmp_path / "part" / "zero_to_fp32.py").touch()
    with pytest.raises(PmodError, match=r"zero_to_fp32.py in the folder"):
        VisionLanguageModel.load(tmp_path / "part")


def test_an_adapter_of_another_kind_is_called_by_its_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "IA3", "base_model_name_or_path": "user/base"}'
    )
    with pytest.raises(PmodError, match="is an adapter of kind IA3, not a whole checkpoint"):
        refuse_part(tmp_path)


def test_weights_are_checked_before_transformers_loads_them(tmp_path):
    """An index may name anything, and transformers reads it."""
    source = make_checkpoint(tmp_path / "source", shards=2)
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    check_weights(source)
    first = next(iter(good))
    for file, message in (
        ("../base/model.safetensors", "not a file of its own folder"),
        ("/etc/passwd", "not a file of its own folder"),
        ("w.bin", "no safetensors file"),
        ("gone.safetensors", "which is not in"),
    ):
        index.write_text(json.dumps({"weight_map": good | {first: file}}))
        with pytest.raises(PmodError, match=message):
            VisionLanguageModel.load(source)
    index.write_text(json.dumps({"weight_map": good}))
    (source / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(PmodError, match="is a Git LFS pointer"):
        VisionLanguageModel.load(source)
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").touch()
    with pytest.raises(PmodError, match=r"pickled weights alone.*pmod convert --allow-pickle"):
        VisionLanguageModel.load(source)


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "evil/evil"},
        {"_attn_implementation": "paged|evil/evil@main:f"},
        {"attn_implementation": {"vision_config": "evil/evil"}},
        {"text_config": TEXT | {"_attn_implementation": "evil/evil"}},
        {"other_config": [{"x": 1}, {"attn_implementation": "evil/evil"}]},
    ],
)
def test_an_attention_that_is_code_of_the_hub_is_not_fetched(tmp_path, config):
    with pytest.raises(PmodError, match="code from the hub, which pmod does not run"):
        check_source(make_checkpoint(tmp_path / "source", config=config))


def test_code_and_adapters_that_transformers_would_load_too(tmp_path):
    source = make_checkpoint(tmp_path / "source", config={"attn_implementation": "eager"})
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    with pytest.raises(PmodError, match="holds an adapter"):
        check_source(source)
    code = {"model_type": "nosuch", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(code))
    with pytest.raises(PmodError, match=r"needs code of its own \(auto_map\), and pmod runs none"):
        read_config(tmp_path / "other")
