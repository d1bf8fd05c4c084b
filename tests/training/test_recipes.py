"""Every shipped recipe is valid and starts a run; every accelerate config is one that accelerate takes."""

from __future__ import annotations

import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from pmod_cli.recipe import load_recipe, recipe_dir, shipped_recipes
from pmod_cli.training.run import finetune

TINY = ("micro_batch_size=2", "global_batch_size=2", "max_steps=1", "max_length=512")


def test_the_shipped_ones():
    assert set(shipped_recipes()) >= {
        "demo",
        "llava-1.5-7b",
        "llava-next-7b",
        "lora-24gb",
        "pmod-llava-1.5-7b",
        "pmod-llava-next-7b",
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_takes_a_first_step(name, pmod_start, demo_data, tmp_path):
    overrides = [f"train.{setting}" for setting in TINY]
    recipe = load_recipe(name)
    text = (recipe_dir() / f"{name}.yaml").read_text()
    for word in ("train:", "resume:", f"--recipe {name}"):
        assert word in text.partition("description")[0]
    if name != "demo":
        assert (recipe.train.global_batch_size, recipe.train.warmup_ratio, recipe.train.weight_decay) == (
            128,
            0.03,
            0.0,
        )
    if recipe.family == "llava_next":
        # The demo's model is of LLaVA-1.5's kind; what differs is the picture's shape.
        assert recipe.train.image_aspect_ratio == "anyres"
        overrides.append("train.image_aspect_ratio=processor")
    result = finetune(pmod_start, *demo_data, tmp_path / "out", recipe=load_recipe(name, overrides))
    assert result.steps == 1
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["name"] == name


@pytest.mark.parametrize(
    "path", sorted((recipe_dir() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_takes_its_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
