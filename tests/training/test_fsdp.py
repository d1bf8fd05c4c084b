"""`pmod finetune` through accelerate's own FSDP2: two gloo processes with the shipped config, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pmod_cli.recipe import recipe_dir
from pmod_cli.training.finetune import finetune
from pmod_cli.training.monitor import read_metrics
from pmod_cli.training.trainer import last_checkpoint

ROOT = Path(__file__).parents[2]
SHARDED = {
    "FSDPCLIPEncoderLayer",
    "FSDPEmbedding",
    "FSDPLinear",  # the head
    "FSDPLlamaDecoderLayer",
    "FSDPMoDLlamaDecoderLayer",
}


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


def launch(model, data, output, recipe, *options, precision=(), **environment):
    """``accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m pmod_cli finetune ...`` with two processes."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    config = recipe_dir() / "accelerate" / "fsdp2.yaml"
    accelerate = ["--config_file", config, "--num_processes", 2, "--main_process_port", 0, *precision]
    words = ["finetune", model, "--data", data[0], "--images", data[1], "--output", output, "--recipe", path]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *accelerate,
        "-m",
        "tests.common.fsdp_worker",
    ]
    return subprocess.run(
        [*map(str, command), *map(str, words), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PMOD_OUT": str(output.parent),
            **environment,
        },
    )


def losses(output):
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


def sharded(folder, rank):
    return set(json.loads((folder / f"shards-{rank}.json").read_text()))


def largest_difference(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert {key: value.dtype for key, value in first.items()} == {k: v.dtype for k, v in second.items()}
    return max(float((first[key].float() - second[key].float()).abs().max()) for key in first)


@pytest.mark.timeout(280)
def test_killed_and_resumed_it_gives_what_one_process_gives(pmod_start, mixed_data, tmp_path, recipe):
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-5, "group_by_modality_length": False}
    finetune(pmod_start, *mixed_data, tmp_path / "one", recipe=recipe(**settings))
    # What saves memory, and no more: half the batch on each process, recomputed in the backward pass.
    settings |= {"micro_batch_size": 2, "gradient_checkpointing": True}
    full = ("--mixed_precision", "no")
    output, work = tmp_path / "two", tmp_path / "two.training"
    killed = launch(pmod_start, mixed_data, output, recipe(**settings), precision=full, PMOD_KILL="3")
    assert killed.returncode != 0
    assert not output.exists()
    assert last_checkpoint(work).name == "checkpoint-2", killed.stderr[-4000:]
    done = launch(pmod_start, mixed_data, output, recipe(**settings), "--resume", precision=full)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not work.exists()

    assert sharded(tmp_path, 0) == sharded(tmp_path, 1) == SHARDED | {"FSDPPmodLlavaForConditionalGeneration"}
    summary = json.loads((output / "training.json").read_text())
    assert (summary["processes"], summary["result"]["resumed_from"]) == (2, 2)
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    weights = [folder / "model.safetensors" for folder in (tmp_path / "one", output)]
    assert largest_difference(*weights) < 1e-5
    # An ordinary checkpoint: nothing is missing, and nothing is left over.
    _, info = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    # The look at the routers, on both processes, saw what one process saw.
    routers = [
        [row["routers"] for row in read_metrics(folder / "metrics.jsonl") if "routers" in row]
        for folder in (tmp_path / "one", output)
    ]
    assert len(routers[1]) == len(routers[0]) == 2
    for one, two in zip(routers[0][-1], routers[1][-1], strict=True):
        assert two["mean_weight"] == pytest.approx(one["mean_weight"], rel=1e-4)
        assert two["entropy"] == pytest.approx(one["entropy"], rel=1e-2)


@pytest.mark.timeout(200)
def test_lora_in_bfloat16(pmod_start, mixed_data, tmp_path, recipe):
    """As the config has it: frozen weights in bfloat16 beside adapters in float32."""
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
    finetune(pmod_start, *mixed_data, tmp_path / "one", recipe=settings)
    done = launch(pmod_start, mixed_data, tmp_path / "two", settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sharded(tmp_path, 0) == sharded(tmp_path, 1) == SHARDED | {"FSDPPeftModel"}
    two = losses(tmp_path / "two")
    assert two == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    # accelerate would round them to bfloat16, whose steps are larger.
    assert not any((loss * 4096).is_integer() for loss in two)
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("one", "two")]
    assert largest_difference(*weights) < 2e-3
