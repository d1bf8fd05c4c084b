"""Every shipped recipe is valid and starts a run; its commands parse; accelerate takes every config."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from pmod_cli.recipe import load_recipe, recipe_dir, shipped_recipes
from pmod_cli.training.finetune import finetune

TINY = ("micro_batch_size=2", "global_batch_size=2", "max_steps=1", "max_length=600")
PAPER = {
    "epochs": 1.0,
    "global_batch_size": 128,
    "learning_rate": 2e-5,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "chat_template": "vicuna_v1",
    "group_by_modality_length": True,
    "freeze_vision_tower": True,
    "ratio_warmup_steps": 0,
}


def _commands(name: str) -> dict[str, list[str]]:
    """The commands in a recipe's header, by what they are for."""
    commands: dict[str, list[str]] = {}
    purpose = ""
    for line in (recipe_dir() / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#   "):
            commands.setdefault(purpose, []).append(line[4:])
        elif line.rstrip().endswith(":"):
            purpose = line[2:].split(" (")[0].rstrip(":")
    return commands


def _parse(words: list[str]) -> tuple[str, dict[str, object]]:
    """Have the command line parse ``pmod WORDS`` without running it."""
    from pmod_cli.cli import app

    command = typer.main.get_command(app)
    verbs = []
    while hasattr(command, "commands"):
        verb, *words = words
        verbs.append(verb)
        command = command.commands[verb]
    return " ".join(verbs), command.make_context(verbs[-1], list(words)).params


def test_the_shipped_ones():
    assert set(shipped_recipes()) >= {
        "demo",
        "llava-1.5-7b",
        "llava-next-7b",
        "lora-24gb",
        "pmod-llava-1.5-7b",
        "pmod-llava-next-7b",
    }


@pytest.mark.parametrize("name", ["pmod-llava-1.5-7b", "pmod-llava-next-7b", "llava-1.5-7b", "llava-next-7b"])
def test_has_the_papers_settings(name):
    recipe = load_recipe(name)
    tiles = recipe.family == "llava_next"
    train = recipe.train.model_dump()
    assert {key: train[key] for key in PAPER} == PAPER
    assert train["max_length"] == (4096 if tiles else 2048)
    assert train["image_aspect_ratio"] == ("anyres" if tiles else "pad")
    ratios = recipe.mod.retention_ratios(32)
    assert ratios[:8] == [None] * 8
    assert sum(1.0 if ratio is None else ratio for ratio in ratios) / 32 == pytest.approx(0.5375, abs=2e-4)


# Other families take theirs in tests/cli/test_every_family.py.
OF_LLAVA = [name for name in shipped_recipes() if load_recipe(name).family in (None, "llava", "llava_next")]


@pytest.mark.parametrize("name", OF_LLAVA)
def test_takes_a_first_step(name, pmod_start, next_start, demo_data, tmp_path):
    recipe = load_recipe(name, [f"train.{setting}" for setting in TINY])
    start = next_start if recipe.family == "llava_next" else pmod_start
    result = finetune(start, *demo_data, tmp_path / "out", recipe=recipe)
    assert result["steps"] == 1
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["name"] == name
    # What lies beside the checkpoint is the whole recipe.
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_commands_of_the_header_parse(name):
    commands = _commands(name)
    first = "calibrate" if name.startswith("calibrated") else "convert"
    assert set(commands) == {"download", first, "check the data", "train", "resume", "many GPUs"}
    for purpose, verb in (
        (first, first),
        ("check the data", "data check"),
        ("train", "finetune"),
        ("resume", "finetune"),
    ):
        program, *words = shlex.split(commands[purpose][0])
        assert program == "pmod"
        parsed, options = _parse(words)
        assert parsed == verb
        assert verb == "calibrate" or options["recipe"] == name
        if verb == "finetune":
            assert options["resume"] == (purpose == "resume")
    launcher, *words = shlex.split(commands["many GPUs"][0])
    if launcher == "accelerate":
        launched = launch_command_parser().parse_args(words[1:])
        assert (recipe_dir().parent / launched.config_file).is_file()
        assert launched.module
        assert launched.training_script == "pmod_cli"
        rest = launched.training_script_args
    else:
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(words)
        assert launched.module
        rest = launched.training_script_args
    assert _parse(rest) == _parse(shlex.split(commands["train"][0])[1:])


@pytest.mark.parametrize(
    "path", sorted((recipe_dir() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_takes_its_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
