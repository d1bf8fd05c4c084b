"""Training through the choice of tokens: the routed layer's results, and a gradient that knows what was skipped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pmod_cli.modeling.choice import presence_attention
from pmod_cli.modeling.layer import MoDDecoderLayer
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pictures, prompt, tiny_model


def _learning(model):
    for layer in model.modules():
        if isinstance(layer, MoDDecoderLayer):
            layer.learns_choice = True
    return model


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_the_forward_pass_is_the_routed_one(decoder):
    mod = MoDConfig([None, None, 0.8, 0.4, 0.2, 0.08, 1.0, 0.01], coverage=0.5)
    model = tiny_model(decoder=decoder, mod=mod).train()
    rows = [prompt(1, 9, seed=1), prompt(1, 4, seed=2)]  # a batch with padding
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "pixel_values": pictures(2),
        "use_cache": False,
    }
    real = inputs["attention_mask"].bool()
    plain = model(**inputs).logits[real]
    learning = _learning(model)(**inputs, output_routing=True)
    torch.testing.assert_close(learning.logits[real], plain, rtol=1e-4, atol=1e-5)
    assert learning.routing[5].kept[1].sum() == len(rows[1]) - 25 + 2
    learning.logits[real].square().mean().backward()
    routers = [p for name, p in model.named_parameters() if ".router.weight" in name]
    assert len(routers) == 6
    # The last one's too, whose choice is felt through its attention.
    assert all(p.grad.abs().sum() > 0 for p in routers)
    assert model.config.text_config._attn_implementation == "pmod_sdpa"
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[real], plain, rtol=0, atol=0)


def test_the_gradient_of_a_skipped_token_is_what_keeping_it_would_change():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 6, 4, dtype=torch.double) for heads in (4, 2, 2))
    module = SimpleNamespace(training=True)

    def read(present):
        return presence_attention(module, query, key, value, None, token_presence=present)[0].double()

    hard = torch.tensor([[1.0, 0, 1, 0, 1, 1]], dtype=torch.double)
    present = hard.clone().requires_grad_()
    out = read(present)
    # As if the absent ones were not there.
    kept = hard[0].bool()
    alone = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, kept], key[:, :, kept].repeat_interleave(2, 1), value[:, :, kept].repeat_interleave(2, 1),
        is_causal=True,
    ).transpose(1, 2)  # fmt: skip
    torch.testing.assert_close(out[:, kept], alone, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(out[:, 5]).detach()
    (out[:, 5] * direction).sum().backward()
    for token in (1, 3):
        more = hard.clone()
        more[0, token] = 1
        change = ((read(more) - out.detach())[:, 5] * direction).sum()
        assert float(present.grad[0, token]) == pytest.approx(float(change), rel=1e-4)
        assert abs(change) > 1e-3
