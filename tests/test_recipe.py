"""Recipes are checked strictly, and a mistake names what was meant."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pmod_cli.modeling.schedule import shifted_cosine
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import default_recipe, load_recipe, mod_config, shipped_recipes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mod.flor=0.1", "unknown key mod.flor, did you mean mod.floor?"),
        ("trian.epochs=2", "unknown key trian, did you mean train?"),
        ("train.lora.rank_=4", "unknown key train.lora.rank_"),
        ("mod.schedule=shifted_cosin", "did you mean shifted_cosine?"),
        ("mod.weight_norm=tnah", "did you mean tanh?"),
        ("mod.floor=2", "mod.floor"),
        ("mod.floor", "expected key=value"),
        ("mod.ratios=[0.5, 0.5]", "goes with mod.schedule: explicit"),
        ("mod.floor=[", "is not a YAML value"),
        ("mod.floor=!!bool x", "is not a YAML value"),
        ("mod.floor=!!timestamp x", "is not a YAML value"),
        ("mod.floor=!!int ''", "is not a YAML value"),
        ("train.parts=5", "train.parts: "),
        ("train.parts=lora", "train.parts: "),
        ("name.sub=1", "name is not a section"),
    ],
)
def test_a_mistake_is_named(override, message):
    with pytest.raises(PmodError) as caught:
        default_recipe([override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ratios_outside_the_interval_are_refused():
    with pytest.raises(PmodError, match=r"0\.0 is outside \(0, 1\]"):
        default_recipe(["mod={schedule: explicit, ratios: [0.0, null]}"])


def test_an_override_reaches_the_schedule():
    ratios = default_recipe(["mod.floor=0.3", "mod.ceiling=0.9"]).mod.retention_ratios(12)
    assert ratios == shifted_cosine(12, floor=0.3, ceiling=0.9)


def test_choice():
    assert mod_config(default_recipe(), 8).choice == "router"
    assert mod_config(default_recipe(["mod.choice=random"]), 8).to_dict()["choice"] == "random"
    with pytest.raises(PmodError, match=r"mod\.choice: Input should be 'router' or 'random'"):
        default_recipe(["mod.choice=chance"])


def test_coverage():
    assert mod_config(default_recipe(["mod.coverage=0.5"]), 8).layer_coverage == [0.5] * 8
    strengths = [0, 1, 2, 3, 4, 5, 6, 7.5]
    assert mod_config(default_recipe([f"mod.coverage={strengths}"]), 8).to_dict()["coverage"] == strengths
    for value, message in (("[1, 2]", "2 coverage strengths for 8"), ("-1", r"-1\.0 is not a number of 0")):
        with pytest.raises(PmodError, match=f"recipe default: .*{message}"):
            mod_config(default_recipe([f"mod.coverage={value}"]), 8)


def test_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mod: {schedule: constant, ratio: 0.25}\n")
    recipe = load_recipe(path, ["mod.first_layer=1"])
    assert recipe.name == "mine"
    assert recipe.mod.retention_ratios(4) == [None, 0.25, 0.25, None]
    for text, message in (
        ("mod: [", "not valid YAML"),
        ("- 1\n", "not a mapping"),
        ("mod: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(PmodError, match=message):
            load_recipe(path)
    with pytest.raises(PmodError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(PmodError, match=r"did you mean llava-1\.5-7b"):
        load_recipe("lava-1.5-7b")


def test_shipped_recipes_load_without_torch():
    names = shipped_recipes()
    assert {"demo", "pmod-llava-1.5-7b", "pmod-llava-next-7b", "llava-1.5-7b", "llava-next-7b"} < set(names)
    script = (
        "import sys; from pmod_cli.recipe import load_recipe, shipped_recipes\n"
        "for name in shipped_recipes(): load_recipe(name)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
