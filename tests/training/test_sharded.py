"""`pmod finetune` through accelerate's own FSDP2 and DeepSpeed: two CPU processes with the shipped configs against one.

DeepSpeed's cases run where it is installed; it needs no GPU, but a compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pmod_cli.modeling.attention import PLAN_FREE
from pmod_cli.output.errors import PmodError
from pmod_cli.output.reading import read_json_lines
from pmod_cli.recipe import recipe_dir
from pmod_cli.training.finetune import finetune
from pmod_cli.training.model import load_for_training
from pmod_cli.training.trainer import last_checkpoint

ROOT = Path(__file__).parents[2]
FSDP2 = {"FSDPCLIPEncoderLayer", "FSDPLlamaDecoderLayer", "FSDPMoDLlamaDecoderLayer"}
"""Layers that are gathered one by one; newer versions of accelerate take embedding and head apart too."""


@pytest.fixture(scope="module")
def mixed_data(demo_data, tmp_path_factory):
    """Pictures and text only in turn, answers of different lengths: batches differ in length and in pictures."""
    records = json.loads(demo_data[0].read_text())
    mixed = [record for pair in zip(records[:8], records[24:], strict=True) for record in pair]
    for index, record in enumerate(mixed):
        record["conversations"][1]["value"] += " and" * (index % 5)
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(mixed))
    return path, demo_data[1]


def launch(config, model, data, output, recipe, *options, **environment):
    """``accelerate launch --config_file recipes/accelerate/CONFIG.yaml -m pmod_cli finetune ...``, two processes."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    accelerate = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--main_process_port", 0]
    accelerate += ["--config_file", recipe_dir() / "accelerate" / f"{config}.yaml", "-m"]
    words = [model, "--data", data[0], "--images", data[1], "--output", output, "--recipe", path, *options]
    command = [sys.executable, *accelerate, "tests.common.sharded_worker", "finetune", *words]
    environment |= {"PMOD_OUT": output.parent, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )


def losses(output):
    return [row["loss"] for row in read_json_lines(output / "metrics.jsonl") if "loss" in row]


def wrapped(folder):
    """Classes of the model as it was trained, and of its parts that were sharded, on both processes."""
    first, second = (json.loads((folder / f"shards-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return set(first)


def largest_difference(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert {key: value.dtype for key, value in first.items()} == {k: v.dtype for k, v in second.items()}
    return max(float((first[key].float() - second[key].float()).abs().max()) for key in first)


@pytest.mark.timeout(280)
@pytest.mark.parametrize("config", ["fsdp2", "zero1", "zero3"])
def test_killed_and_resumed_it_gives_what_one_process_gives(config, pmod_start, mixed_data, tmp_path, recipe):
    if config != "fsdp2" and not is_deepspeed_available():
        pytest.skip("DeepSpeed is not installed")
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-5, "group_by_modality_length": False}
    finetune(pmod_start, *mixed_data, tmp_path / "one", recipe=recipe(**settings))
    # The same batches: half of each on a process, recomputed in the backward pass.
    half = recipe(**settings, micro_batch_size=2, gradient_checkpointing=True)
    output, work = tmp_path / "two", tmp_path / "two.training"
    killed = launch(config, pmod_start, mixed_data, output, half, PMOD_KILL=3)
    assert killed.returncode != 0
    assert not output.exists()
    assert last_checkpoint(work).name == "checkpoint-2", killed.stderr[-4000:]
    with pytest.raises(PmodError, match="the sharding changed"):
        finetune(pmod_start, *mixed_data, output, recipe=half, resume=True)
    done = launch(config, pmod_start, mixed_data, output, half, "--resume")
    assert done.returncode == 0, done.stderr[-4000:]
    assert not work.exists()

    whole = "PmodLlavaForConditionalGeneration"
    assert wrapped(tmp_path) >= (FSDP2 | {f"FSDP{whole}"} if config == "fsdp2" else {"DeepSpeedEngine"})
    summary = json.loads((output / "training.json").read_text())
    assert (summary["processes"], summary["result"]["resumed_from"]) == (2, 2)
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    weights = [folder / "model.safetensors" for folder in (tmp_path / "one", output)]
    assert largest_difference(*weights) < 1e-5
    # An ordinary checkpoint: nothing is missing, and nothing is left over.
    assert json.loads((output / "config.json").read_text())["architectures"] == [whole]
    _, info = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    # The look at the routers, on both processes, saw what one process saw.
    routers = [
        [row["routers"] for row in read_json_lines(folder / "metrics.jsonl") if "routers" in row]
        for folder in (tmp_path / "one", output)
    ]
    assert len(routers[1]) == len(routers[0]) == 2
    for one, two in zip(routers[0][-1], routers[1][-1], strict=True):
        assert two["mean_weight"] == pytest.approx(one["mean_weight"], rel=1e-4)
        assert two["entropy"] == pytest.approx(one["entropy"], rel=1e-2)


@pytest.mark.timeout(200)
def test_lora_in_bfloat16_is_merged(pmod_start, mixed_data, tmp_path, recipe):
    """In the precision of the shipped recipes: frozen weights in bfloat16 beside adapters in float32."""
    settings = recipe(
        max_steps=3,
        micro_batch_size=2,
        save_steps=100,
        learning_rate=1e-4,
        dtype="bfloat16",
        gradient_checkpointing=True,
        group_by_modality_length=False,
        lora={"r": 4, "alpha": 8, "dropout": 0.0},
    )
    finetune(pmod_start, *mixed_data, tmp_path / "one", recipe=settings, merge_lora=True)
    done = launch("fsdp2", pmod_start, mixed_data, tmp_path / "two", settings, "--merge")
    assert done.returncode == 0, done.stderr[-4000:]
    assert wrapped(tmp_path) >= FSDP2 | {"FSDPPeftModel"}
    two = losses(tmp_path / "two")
    assert two == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    # accelerate would round them to bfloat16, whose steps are larger.
    assert not any((loss * 4096).is_integer() for loss in two)
    weights = [tmp_path / name / "model.safetensors" for name in ("one", "two")]
    assert largest_difference(*weights) < 2e-3


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_batches_of_new_lengths_meet_no_plans(lora, pmod_start, recipe):
    """No part that is trained, or runs along, takes attention that torch prepares for each shape."""
    network, _ = load_for_training(pmod_start, recipe(lora=lora).train)
    parts = [part for part in network.modules() if type(part).__name__.endswith("Attention")]
    assert len(parts) == 8 + network.config.vision_config.num_hidden_layers
    assert {part.config._attn_implementation for part in parts} == {PLAN_FREE}
