"""``--kernels``: which kernels a model runs, and what is refused without a GPU or without liger-kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from pmod_cli.kernels import use_kernels
from pmod_cli.output.errors import MissingExtraError, PmodError
from tests.common.tiny import pictures, prompt, tiny_model


def test_pytorch_alone_and_auto():
    model = tiny_model()
    assert use_kernels(model, "torch", on_gpu=True) == []
    assert model.get_decoder().kernels == "torch"
    assert use_kernels(model) == []  # on a CPU
    assert model.get_decoder().kernels == "auto"


def test_what_is_refused(monkeypatch):
    model = tiny_model()
    with pytest.raises(PmodError, match="liger-kernel needs a GPU"):
        use_kernels(model, "liger", on_gpu=False)
    with pytest.raises(PmodError, match="unknown kernels 'fast'"):
        use_kernels(model, "fast")
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(MissingExtraError, match="liger-kernel"):
            use_kernels(model, "liger", on_gpu=True)


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available(),
    reason="liger-kernel needs a GPU",
)
def test_liger_gives_the_same_logits_and_gradients():
    plain, fused = tiny_model().cuda(), tiny_model().cuda()
    assert use_kernels(fused, "liger") == ["pmod", "liger"]
    ids = torch.tensor([prompt(1, 8)], device="cuda")
    inputs = {"input_ids": ids, "pixel_values": pictures(1).cuda(), "labels": ids}
    outputs = [model(**inputs) for model in (plain, fused)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, atol=1e-4, rtol=1e-4)
    for output in outputs:
        output.loss.backward()
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)
