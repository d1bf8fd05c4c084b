"""Two real processes (gloo) against one with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pmod_cli.output.reading import read_json_lines
from pmod_cli.training.finetune import finetune

ROOT = Path(__file__).parents[2]


def _run(processes, model, data, images, output, recipe):
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = ["-m", "pmod_cli", "finetune", model, "--data", data, "--images", images, "--output", output]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words), "--recipe", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [row["loss"] for row in read_json_lines(output / "metrics.jsonl") if "loss" in row]


@pytest.mark.timeout(200)
def test_two_processes_give_the_losses_of_one(pmod_start, tmp_path, demo_data, recipe):
    # Pictures and text only in turn, shuffled: some micro batches have no picture while the other process's has.
    records = json.loads(demo_data[0].read_text())
    mixed = [record for pair in zip(records[:8], records[24:], strict=True) for record in pair]
    data = tmp_path / "mixed.json"
    data.write_text(json.dumps(mixed))
    settings = {"max_steps": 4, "micro_batch_size": 2, "save_steps": 100, "learning_rate": 1e-5}
    settings |= {"group_by_modality_length": False}
    finetune(pmod_start, data, demo_data[1], tmp_path / "one", recipe=recipe(**settings))
    one = [row["loss"] for row in read_json_lines(tmp_path / "one" / "metrics.jsonl") if "loss" in row]
    two = _run(2, pmod_start, data, demo_data[1], tmp_path / "two", recipe(**settings))
    assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
    summary = json.loads((tmp_path / "two" / "training.json").read_text())
    assert summary["processes"] == 2
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    difference = max(float((first[key] - second[key]).abs().max()) for key in first)
    assert difference < 1e-4


@pytest.mark.timeout(200)
def test_sigterm_to_one_of_two_processes_stops_both_in_the_same_step(pmod_start, tmp_path, demo_data, recipe):
    """`killed_run` signals itself from the progress callback, which only the first process calls."""
    settings = recipe(max_steps=6, micro_batch_size=2, save_steps=100, learning_rate=1e-5)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(settings.model_dump_json())))
    words = [
        ROOT / "tests" / "common" / "killed_run.py",
        pmod_start,
        *demo_data,
        tmp_path / "out",
        path,
        15,
        3,
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout.count("stopped by SIGTERM after step 3") == 2, done.stderr[-3000:]
    # One process goes on with what two left, and both have the same data order.
    result = finetune(pmod_start, *demo_data, tmp_path / "out", recipe=settings, resume=True)
    assert (result["resumed_from"], result["steps"]) == (3, 6)
    finetune(pmod_start, *demo_data, tmp_path / "whole", recipe=settings)
    curves = [
        [row["loss"] for row in read_json_lines(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("out", "whole")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_a_blank_image_for_text_changes_nothing(pmod_start, demo_data, processor):
    from transformers import AutoModelForImageTextToText

    from pmod_cli.data.batches import Collator, EncodedDataset
    from pmod_cli.data.dataset import open_data

    data = open_data(*demo_data)
    dataset = EncodedDataset(data.samples, data.pictures, processor, 2048)
    items = [dataset[24], dataset[25]]
    model = AutoModelForImageTextToText.from_pretrained(pmod_start, dtype=torch.float32).train()
    losses = []
    for blank in (False, True):
        batch = Collator(processor, image_for_text=blank)(items)
        assert ("pixel_values" in batch) == blank
        batch = {key: value for key, value in batch.items() if key != "notes"}
        model.zero_grad(set_to_none=True)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        named = dict(model.named_parameters())
        routers = [p.grad for name, p in named.items() if ".router." in name]
        assert all(grad is not None and not grad.any() for grad in routers)
        projector = [p.grad for name, p in named.items() if "projector" in name]
        assert not blank or all(grad is not None and not grad.any() for grad in projector)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
