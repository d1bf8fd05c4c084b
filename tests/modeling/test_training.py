"""Training: checkpointing, autocast, LoRA, DDP, FSDP2, and one host synchronisation a forward pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pmod_cli.modeling.layer import MoDDecoderLayer
from tests.common.tiny import IMAGE, enable_checkpointing, pad, pictures, prompt, tiny_model

PROMPTS = [prompt(1, 5, seed=1), prompt(0, 9, seed=2), prompt(2, 4, seed=3)]


def batch():
    ids, mask = pad(PROMPTS, "right")
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3), "labels": labels}


def test_bf16_autocast_trains_and_ranks_in_fp32():
    model = tiny_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch(), output_routing=True)
    output.loss.backward()
    routers = {name: p.grad for name, p in model.named_parameters() if ".router." in name}
    assert all(torch.isfinite(gradient).all() for gradient in routers.values())
    assert all(gradient.any() for gradient in routers.values())
    assert all(layer.logits.dtype == torch.float32 for layer in output.routing if layer is not None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_identical_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            enable_checkpointing(model, reentrant)
            layers = model.model.language_model.layers
            assert all(layer.gradient_checkpointing for layer in layers)
        model(**batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_bf16_model_generates():
    model = tiny_model().to(torch.bfloat16)
    ids = torch.tensor([PROMPTS[0]])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pictures(1).bfloat16(),
        max_new_tokens=4,
        do_sample=False,
    )
    assert output.shape[1] > ids.shape[1]


def test_lora_with_routers_trained_in_full(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=4,
        target_modules=rf".*language_model\.layers\.\d+\..*\.({'|'.join(layers)})",
        modules_to_save=["router"],
        init_lora_weights=False,
    )
    wrapped = get_peft_model(model, config).train()
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert sum("router" in name for name in trained) == 12
    assert all("lora_" in name or "router" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = wrapped(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    wrapped.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(**batch()).logits
    fresh = tiny_model()
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(before[name])
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch()).logits, expected, atol=1e-4, rtol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch()).logits, expected, atol=1e-4, rtol=0)
    assert isinstance(merged.model.language_model.layers[-1], MoDDecoderLayer)
    assert not any("lora" in name for name in merged.state_dict())


def scalar_reads(function):
    """How often the operators that wait for a GPU run: reads of a scalar and `nonzero`."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    counts = {event.key: event.count for event in recorded.key_averages()}
    return {
        name: counts.get(name, 0) for name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item")
    }


@pytest.mark.parametrize("padded", [False, True])
def test_one_host_synchronisation_a_prefill(padded, monkeypatch):
    """The tower and projector have none; transformers' check of the placeholders, before the decoder, is its own."""
    model = tiny_model()
    ids, mask = pad(PROMPTS, "left") if padded else (torch.tensor([PROMPTS[2]]), None)
    images = 3 if padded else 2
    features = model.model.get_image_features(pictures(images), return_dict=True)
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": features}}
    with torch.no_grad():
        model.model(**inputs)
    embeds, rows = model.get_input_embeddings()(ids), torch.cat(list(features.pooler_output))
    check = scalar_reads(lambda: model.model.get_placeholder_mask(ids, embeds, rows))
    assert scalar_reads(lambda: model.model(**inputs)) == check
    # The one transfer is `tolist` of the token counts, which on a CPU reads memory without an operator of its
    # own, so it is counted by hand below.
    transfers = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda tensor: transfers.append(tensor.shape) or original(tensor)
    )
    with torch.no_grad():
        model.model(**inputs)
    assert len(transfers) == 1


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Losses and weights of the same training by DDP and by FSDP2 on two gloo processes, and in one process."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PMOD_OUT": str(folder)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "tests.common.distributed_worker",
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=220
    )
    assert done.returncode == 0, done.stderr[-3000:]

    from tests.common import distributed_worker

    together = torch.load(folder / "result.pt", weights_only=True)
    return together, distributed_worker.train_alone(), folder / "checkpoint"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("method", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(two_processes, method):
    """Rank 1's batches are text only: every router still has a gradient, so that nobody waits for it."""
    together, expected, _ = two_processes
    actual = together[method]
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(torch.tensor(actual["losses"]), torch.tensor(expected["losses"]), **close)
    assert set(actual["weights"]) == set(expected["weights"])
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(actual["weights"][name], weight, **close)


def test_a_gathered_state_dict_loads_as_an_ordinary_checkpoint(two_processes):
    from transformers import AutoModelForImageTextToText

    from tests.common import distributed_worker

    _, expected, checkpoint = two_processes
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    alone = distributed_worker.frozen_tower_model().eval()
    alone.load_state_dict(expected["weights"])
    sample = distributed_worker.sample(0, step=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**sample).logits, alone(**sample).logits, atol=1e-4, rtol=0)
