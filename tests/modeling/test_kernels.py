"""The fused kernels: Triton's against their references in a process of their own, and the model's fused path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmod_cli.modeling.routing import can_fuse
from pmod_cli.profiling.operators import OperatorCount
from tests.common.tiny import pad, pictures, prompt, tiny_model


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_against_their_references():
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    checks = Path(__file__).with_name("triton_checks.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.fixture
def batch():
    ids, mask = pad([prompt(1, 8), prompt(0, 8), prompt(2, 4)], "left")
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3)}


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_fused_path_equals_the_pytorch_path(family, decoder):
    """On the CPU the operators run their references, so that the two paths must agree to rounding."""
    model = tiny_model(family, decoder)
    ids, mask = (
        pad([prompt(1, 8), prompt(0, 8)], "right") if family == "llava" else pad([prompt(0, 8)], "right")
    )
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "llava":
        inputs["pixel_values"] = pictures(1)
    results = []
    for kernels in ("torch", "fused"):
        model.model.language_model.kernels = kernels
        with torch.no_grad():
            results.append(model(**inputs).logits[mask.bool()])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_slots_filled_up_are_not_cached(cache):
    """A single prompt's rows are rounded up; what is stored, and the tokens after it, are as without."""
    model = tiny_model()
    ids = torch.tensor([prompt(2, 8)])
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    options |= {"pixel_values": pictures(2), "return_dict_in_generate": True, "output_logits": True}
    results = []
    for kernels in ("torch", "fused"):
        model.model.language_model.kernels = kernels
        results.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    plain, fused = results
    torch.testing.assert_close(fused.logits, plain.logits, atol=1e-5, rtol=1e-5)
    for expected, actual in zip(plain.past_key_values.layers, fused.past_key_values.layers, strict=True):
        assert actual.keys.shape == expected.keys.shape
        torch.testing.assert_close(actual.keys, expected.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual.values, expected.values, atol=1e-5, rtol=1e-5)


def fused_operators(model, inputs):
    model.model.language_model.kernels = "fused"
    with OperatorCount() as count:
        output = model(**inputs, output_routing=True)
    return output, sum(times for name, times in count.operators.items() if name.startswith("pmod."))


def test_when_the_kernels_are_used(batch):
    model = tiny_model()
    layers = len(model.model.mod.mod_layers)
    with torch.no_grad():
        output, launches = fused_operators(model, batch)
        assert launches == 5 * layers
        routing = output.routing[-1]
        assert torch.equal(routing.kept.sum(-1), routing.kept_slots.sum(-1))
        handle = model.model.language_model.layers[-1].input_layernorm.register_forward_hook(lambda *_: None)
        assert fused_operators(model, batch)[1] == 5 * (layers - 1)  # whoever watches a module sees it called
        handle.remove()
    assert fused_operators(model, batch)[1] == 0  # gradients are the PyTorch path's
    softmax = tiny_model(mod=model.model.mod.__class__([None, 0.5] * 4, weight_norm="softmax"))
    with torch.no_grad():
        assert fused_operators(softmax, batch)[1] == 0
        assert not can_fuse(softmax.model.language_model.layers[1], torch.zeros(1, 4, 32))
