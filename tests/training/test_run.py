"""Short real runs of the demo's model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.demo.job import BASELINE
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling.layer import MoDDecoderLayer
from pmod_cli.output.errors import GateError, PmodError
from pmod_cli.output.reading import read_json_lines
from pmod_cli.recipe import load_recipe
from pmod_cli.training.callbacks import RatioWarmup
from pmod_cli.training.finetune import finetune
from pmod_cli.training.finish import save_result
from pmod_cli.training.merge import merge_adapter


def _tensors(folder):
    return {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("kind", ["dense", "pmod"])
def test_result_is_an_ordinary_checkpoint(kind, baseline, pmod_start, demo_data, tmp_path, recipe):
    start = baseline if kind == "dense" else pmod_start
    shown = []
    result = finetune(
        start, *demo_data, tmp_path / "out", recipe=recipe(), announce=lambda *told: shown.append(told)
    )
    assert result["steps"] == 6
    parts = {part["part"]: part for part in shown[0][0]}
    assert parts["vision tower"]["trained"] == 0
    assert parts["projector"]["frozen"] == parts["language model"]["frozen"] == 0
    assert ("routers" in parts) == (kind == "pmod")
    before, after = _tensors(start), _tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        frozen = "vision_tower" in key
        # The last layer's router has no say in any text token.
        idle = "layers.7.router" in key
        assert torch.equal(tensor, after[key]) == (frozen or idle), key
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.config.model_type == ("llava" if kind == "dense" else "pmod_llava")
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["recipe"]["train"]["max_steps"] == 6
    assert summary["result"] == result | {"output": Path(result["output"]).name}
    rows = read_json_lines(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    routers = [row["routers"] for row in rows if "routers" in row]
    if kind == "pmod":
        assert [row["layer"] for row in routers[-1]] == [2, 3, 4, 5, 6, 7]
        assert all(0 < row["entropy"] <= 1 for row in routers[-1])
        assert all(row["mean_weight"] == 1 and row["changed"] is None for row in routers[0])
    else:
        assert not routers
    assert {"loss", "grad_norm", "learning_rate", "samples_per_second", "tokens_per_second"} < set(rows[1])
    assert summary["seed"] == 42
    assert len(summary["data_sha256"]) == 64
    assert torch.__version__.startswith(summary["versions"]["torch"])
    memory = shown[0][1]
    assert memory["fits"]
    trained = sum(part["trained"] for part in result["parts"])
    assert (memory["gradients"], memory["optimizer"]) == (4 * trained, 8 * trained)


def test_it_learns(pmod_start, demo_data, tmp_path, recipe):
    records = json.loads(demo_data[0].read_text())
    for record in records:
        record["conversations"][1]["value"] = "circle circle"
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    result = finetune(pmod_start, data, demo_data[1], tmp_path / "out", recipe=recipe(max_steps=12))
    assert result["final_loss"] < 0.5 * result["first_loss"]


def test_gradient_accumulation_and_checkpointing_change_nothing(pmod_start, demo_data, tmp_path, recipe):
    curves = []
    for index, extra in enumerate(({}, {"micro_batch_size": 2}, {"gradient_checkpointing": True})):
        output = tmp_path / str(index)
        finetune(pmod_start, *demo_data, output, recipe=recipe(max_steps=4, **extra))
        curves.append([row["loss"] for row in read_json_lines(output / "metrics.jsonl") if "loss" in row])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_router_rate_of_its_own(pmod_start, demo_data, tmp_path, recipe):
    outputs = []
    for rate in (None, 1e-12):
        output = tmp_path / str(rate)
        settings = recipe(max_steps=3, router_learning_rate=rate)
        finetune(pmod_start, *demo_data, output, recipe=settings)
        tensors = _tensors(output)
        outputs.append(max(value.abs().max() for key, value in tensors.items() if ".router." in key))
    assert outputs[0] > 1e-4
    assert outputs[1] < 1e-9


def test_loss_that_is_not_finite_stops_the_run(pmod_start, demo_data, tmp_path, recipe):
    with pytest.raises(GateError, match=r"step \d+: the .* (nan|inf).*samples .*checkpoint") as error:
        finetune(
            pmod_start,
            *demo_data,
            tmp_path / "out",
            recipe=recipe(max_steps=30, learning_rate=1e30, warmup_ratio=0),
        )
    named = str(error.value).partition("samples ")[2].partition(";")[0].split(", ")
    assert len(named) == 4
    assert set(named) <= {str(record["id"]) for record in json.loads(demo_data[0].read_text())}
    assert not (tmp_path / "out").exists()


def test_gradient_that_is_not_finite_stops_the_run(pmod_start, demo_data, tmp_path, recipe, monkeypatch):
    from pmod_cli.training.trainer import PmodTrainer

    clip = PmodTrainer._clip_grad_norm

    def overflow(self, model):
        if self.state.global_step == 4:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return clip(self, model)

    monkeypatch.setattr(PmodTrainer, "_clip_grad_norm", overflow)
    with pytest.raises(GateError, match=r"step 5: the gradient norm is inf; samples .*checkpoint-4 \("):
        finetune(pmod_start, *demo_data, tmp_path / "out", recipe=recipe())
    last = tmp_path / "out.training" / "checkpoint-4"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last / "model.safetensors").values())


def test_routers_and_loss_go_to_tensorboard_and_into_a_picture(pmod_start, demo_data, tmp_path, recipe):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = recipe(max_steps=6, logging_steps=2, router_stats_steps=3, report_to="tensorboard")
    finetune(pmod_start, *demo_data, tmp_path / "out", recipe=settings)
    (events,) = (tmp_path / "out" / "runs").iterdir()
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()

    def logged(name):
        return [event.step for event in accumulator.Scalars(f"train/{name}")]

    assert logged("loss") == [1, 2, 4, 6]
    assert logged("tokens_per_second") == [1, 2, 4, 6]
    for layer in range(2, 8):
        assert logged(f"routers/layer_{layer:02d}/mean_weight") == [0, 3, 6]
        assert logged(f"routers/layer_{layer:02d}/entropy") == [0, 3, 6]
        assert logged(f"routers/layer_{layer:02d}/changed") == [3, 6]
    rows = read_json_lines(tmp_path / "out" / "metrics.jsonl")
    looks = {row["step"]: row["routers"] for row in rows if "routers" in row}
    values = [event.value for event in accumulator.Scalars("train/routers/layer_04/changed")]
    assert values == pytest.approx([looks[step][2]["changed"] for step in (3, 6)])
    with Image.open(tmp_path / "out" / "training.png") as picture:
        assert picture.size[1] > picture.size[0]
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_statistics_of_routers_by_hand(pmod_start, demo_data, processor):
    from pmod_cli.data.batches import Collator, EncodedDataset
    from pmod_cli.data.dataset import open_data
    from pmod_cli.training.monitor import make_probe, router_statistics

    data = open_data(*demo_data)
    dataset = EncodedDataset(data.samples, data.pictures, processor, 2048)
    model = AutoModelForImageTextToText.from_pretrained(pmod_start, dtype=torch.float32).train()
    probe = make_probe(model, dataset, Collator(processor), 3)
    assert [len(batch["input_ids"]) for batch in probe] == [3, 3, 2]
    first, masks = router_statistics(model, probe, {})
    assert model.training
    # Routers at zero: all weights are 1, and ties are broken alike in every image.
    for row, ratio in zip(first, [0.8, 0.6, 0.4, 0.2, 0.15, 0.15], strict=True):
        assert row["mean_weight"] == 1
        assert row["entropy"] == pytest.approx(torch.tensor(ratio * 100).log().item() / np.log(100))
        assert masks[row["layer"]].float().mean() == pytest.approx(ratio)
    router = model.model.language_model.layers[4].router
    torch.nn.init.normal_(router.weight)
    second, changed = router_statistics(model, probe, masks)
    for row in second[:2]:
        assert row["changed"] == 0
    assert second[2]["changed"] == pytest.approx((masks[4] ^ changed[4]).float().mean().item())
    assert second[2]["changed"] > 0.1
    assert second[2]["mean_weight"] != 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router_statistics(model, probe, masks)


def test_a_full_disk_is_one_line_and_loses_nothing(pmod_start, demo_data, tmp_path, recipe):
    """Real writes that fail: no file of this process may grow beyond 1 MB, which the optimizer's would."""
    import resource

    from pmod_cli.training.monitor import Monitor

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    output, work = tmp_path / "out", tmp_path / "out.training"

    class Full(Monitor):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
            super().on_step_end(args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pmod_cli.training.finetune.Monitor", Full)
        try:
            with pytest.raises(PmodError, match=r"step 4: cannot write a checkpoint.*go on with --resume"):
                finetune(pmod_start, *demo_data, output, recipe=recipe())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-2"]
    result = finetune(pmod_start, *demo_data, output, recipe=recipe(), resume=True)
    assert (result["resumed_from"], result["steps"]) == (2, 6)
    result_path = tmp_path / "second"
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                "pmod_cli.training.finetune.save_result",
                lambda *args, **kwargs: (
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1])),
                    save_result(*args, **kwargs),
                ),
            )
            with pytest.raises(PmodError, match=r"cannot write .*second: .*--resume"):
                finetune(pmod_start, *demo_data, result_path, recipe=recipe())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not result_path.exists()
    assert (tmp_path / "second.training" / "checkpoint-6").exists()


def test_lora(pmod_start, demo_data, tmp_path, recipe):
    pytest.importorskip("peft")
    settings = recipe(max_steps=4, lora={"r": 4, "alpha": 8, "dropout": 0.0})
    finetune(pmod_start, *demo_data, tmp_path / "merged", recipe=settings, merge_lora=True)
    finetune(pmod_start, *demo_data, tmp_path / "adapter", recipe=settings)
    before, merged = _tensors(pmod_start), _tensors(tmp_path / "merged")
    assert before.keys() == merged.keys()
    changed = {key for key in before if not torch.equal(before[key], merged[key])}
    assert not [key for key in changed if "vision_tower" in key or "embed_tokens" in key or "norm" in key]
    assert [key for key in changed if ".router." in key]
    assert [key for key in changed if "q_proj" in key]
    assert [key for key in changed if "multi_modal_projector" in key]
    result = merge_adapter(tmp_path / "adapter", tmp_path / "again")
    assert (result["to"], result["router_parameters"]) == ("merged", 582)
    later = _tensors(tmp_path / "again")
    assert later.keys() == merged.keys()
    for key, value in later.items():
        assert value.dtype == merged[key].dtype
        torch.testing.assert_close(value, merged[key], rtol=1e-4, atol=1e-6)
    VisionLanguageModel.load(tmp_path / "again")
    # What is no adapter, has lost its base, or belongs to another model.
    with pytest.raises(PmodError, match=r"not an adapter"):
        merge_adapter(tmp_path / "merged", tmp_path / "new")
    named = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(named.read_text())
    for base, message in ((tmp_path / "gone", "the adapter's base: .*gone"), (BASELINE, "does not fit")):
        named.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
        with pytest.raises(PmodError, match=message):
            merge_adapter(tmp_path / "adapter", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_ratio_warm_up_ends_exactly_on_the_schedule(pmod_start):
    model = AutoModelForImageTextToText.from_pretrained(pmod_start)
    layers = [layer for layer in model.modules() if isinstance(layer, MoDDecoderLayer)]
    schedule = [ratio for ratio in model.config.mod_config.retention_ratios if ratio is not None]
    warmup = RatioWarmup(model, 7)
    seen = []
    for step in range(10):
        warmup.set_step(step)
        seen.append([layer.retention_ratio for layer in layers])
    assert seen[0] == [1.0] * 6
    assert all(a >= b for a, b in itertools.pairwise(seen))
    assert seen[6] != schedule
    assert seen[7] == seen[9] == schedule


def test_bad_samples_are_replaced_counted_and_in_the_end_too_many(pmod_start, demo_data, tmp_path, recipe):
    records = json.loads(demo_data[0].read_text())
    images = tmp_path / "images"
    images.mkdir()
    for path in demo_data[1].iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    name = records[0]["image"]
    (images / name).write_bytes(b"no picture")
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    settings = {"max_steps": 8, "save_steps": 100}
    result = finetune(pmod_start, data, images, tmp_path / "out", recipe=recipe(**settings))
    assert list(result["bad_samples"]) == [str(records[0]["id"])]
    with pytest.raises(GateError, match="max_bad_samples=0"):
        finetune(pmod_start, data, images, tmp_path / "out2", recipe=recipe(**settings, max_bad_samples=0))
    (images / name).unlink()
    with pytest.raises(PmodError, match="missing image"):
        finetune(pmod_start, data, images, tmp_path / "out3", recipe=recipe(**settings, max_bad_samples=0))


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(
    pmod_start, demo_data, tmp_path, recipe, monkeypatch
):
    from pmod_cli.training.trainer import checkpoint_bytes

    finetune(pmod_start, *demo_data, tmp_path / "first", recipe=recipe(max_steps=1))
    parts = json.loads((tmp_path / "first" / "training.json").read_text())["result"]["parts"]
    needed = 3 * checkpoint_bytes(parts, adapter_only=False)
    monkeypatch.setattr("pmod_cli.checkpoints.write.free_space", lambda place: needed - 1)
    with pytest.raises(PmodError, match=r" needs [\d.]+ MB, 1 B more than are free"):
        finetune(pmod_start, *demo_data, tmp_path / "out", recipe=recipe())
    # A single checkpoint fits, and so the estimate is not below what one takes.
    size = sum(path.stat().st_size for path in pmod_start.iterdir())
    assert checkpoint_bytes(parts, adapter_only=False) > size
    finetune(pmod_start, *demo_data, tmp_path / "out", recipe=recipe(max_steps=1, save_steps=100))


def test_input_that_cannot_work(pmod_start, demo_data, tmp_path, recipe):
    (tmp_path / "taken").mkdir()
    with pytest.raises(PmodError, match="exists"):
        finetune(pmod_start, *demo_data, tmp_path / "taken", recipe=recipe())
    with pytest.raises(PmodError, match="not a multiple"):
        finetune(pmod_start, *demo_data, tmp_path / "out", recipe=recipe(micro_batch_size=3))
    with pytest.raises(PmodError, match="no checkpoint folder"):
        finetune(tmp_path / "none", *demo_data, tmp_path / "out", recipe=recipe())
    with pytest.raises(PmodError, match="anyres"):
        finetune(pmod_start, *demo_data, tmp_path / "out", recipe=recipe(image_aspect_ratio="anyres"))
    with pytest.raises(PmodError, match="--merge"):
        finetune(pmod_start, *demo_data, tmp_path / "out", recipe=recipe(), merge_lora=True)


def _set_routers(folder, source, scale=0.02):
    """A copy of a checkpoint with routers that prefer something, and a tighter schedule."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".router.weight" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.config.mod["retention_ratios"] = [None, None, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


def test_routers_alone_learn_from_the_dense_model(pmod_start, demo_data, tmp_path, recipe):
    start = _set_routers(tmp_path / "start", pmod_start)
    train = {"parts": ["routers"], "distill": True, "learning_rate": 2e-3, "max_steps": 24, "save_steps": 100}
    result = finetune(start, *demo_data, tmp_path / "out", recipe=recipe(**train, dtype="bfloat16"))
    losses = [row["loss"] for row in read_json_lines(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8]), losses
    parts = {part["part"]: part for part in result["parts"]}
    assert [name for name, part in parts.items() if part["trained"]] == ["routers"]
    assert result["memory"]["optimizer"] == 8 * parts["routers"]["trained"]
    before, after = _tensors(start), _tensors(tmp_path / "out")
    for key, tensor in before.items():
        rounded = tensor.bfloat16().float()
        assert torch.equal(rounded, after[key]) == (".router." not in key), key  # the last layer's learns too


def test_what_is_learned_from_is_the_dense_model(pmod_start, demo_data, processor, tmp_path):
    from pmod_cli.data.batches import Collator, EncodedDataset
    from pmod_cli.data.dataset import open_data
    from pmod_cli.recipe import default_recipe
    from pmod_cli.training.distill import answer_logprobs, divergence, teacher_logprobs
    from pmod_cli.training.model import load_for_training

    data = open_data(*demo_data)
    dataset = EncodedDataset(data.samples, data.pictures, processor, 2048)
    batch = Collator(processor)([dataset[0], dataset[1]])
    batch.pop("notes")
    plain = {key: value for key, value in batch.items() if key != "labels"}
    dense = AutoModelForImageTextToText.from_pretrained(BASELINE, dtype=torch.float32)
    with torch.no_grad():
        wanted = answer_logprobs(dense(**plain).logits, batch["labels"])
    start = _set_routers(tmp_path / "start", pmod_start)
    settings = [
        "train.parts=[routers, lora]",
        "train.distill=true",
        "train.dtype=float32",
        "train.gradient_checkpointing=false",
    ]
    network, _ = load_for_training(start, default_recipe(settings).train)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    network.train()
    ratios = [layer.retention_ratio for layer in network.modules() if isinstance(layer, MoDDecoderLayer)]
    torch.testing.assert_close(teacher_logprobs(network, network, batch), wanted, rtol=1e-4, atol=1e-4)
    assert ratios == [
        layer.retention_ratio for layer in network.modules() if isinstance(layer, MoDDecoderLayer)
    ]
    student = answer_logprobs(network(**plain).logits, batch["labels"])
    found = divergence(wanted, student, None).detach()
    by_hand = (wanted.exp() * (wanted - student)).sum(-1).mean()
    assert float(found) == pytest.approx(float(by_hand.detach()), rel=1e-4)
    assert float(found) > 0.01
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(".router." in name or "lora_" in name for name in trained)


def test_parts_that_cannot_be_trained(baseline, pmod_start, demo_data, tmp_path, recipe):
    with pytest.raises(PmodError, match=r"none of train\.parts: routers"):
        finetune(baseline, *demo_data, tmp_path / "out", recipe=recipe(parts=["routers"], distill=True))
    settings = recipe(parts=["routers", "lora"], distill=True)
    with pytest.raises(PmodError, match="this one is dense"):
        finetune(baseline, *demo_data, tmp_path / "out", recipe=settings)
    convert(plan_conversion(baseline, recipe=load_recipe("demo", ["mod.choice=random"])), tmp_path / "chance")
    with pytest.raises(PmodError, match="tokens are random"):
        finetune(tmp_path / "chance", *demo_data, tmp_path / "out", recipe=settings)
    for train, message in (
        ({"distill": True}, "go together"),
        ({"parts": ["routers"]}, "go together"),
        ({"parts": [], "distill": True}, "is .routers. or .routers, lora."),
        ({"parts": ["routers"], "lora": {}, "distill": True}, "lora in train.parts"),
        ({"parts": ["tower"], "distill": True}, "train.parts"),
    ):
        with pytest.raises(PmodError, match=message):
            recipe(**train)
    assert recipe(parts=["routers", "lora"], distill=True).train.lora is not None
