"""`torch.compile` of the decoder: no graph breaks, and no new graph for a new prompt length.

The backend is "eager": what is tested is tracing. Graph breaks are errors (``fullgraph=True``).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache

from pmod_cli.modeling.cache import adopt_cache
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.masks import causal_mask
from pmod_cli.modeling.plan import RoutingPlan, count_tokens
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import IMAGE, pad, pictures, prompt, tiny_model

MOD = MoDConfig([None, 0.6, 0.25])


@pytest.fixture
def compiled():
    """A model, and its decoder compiled with ``dynamic=True``."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(mod=MOD, num_hidden_layers=3)
    decoder = torch.compile(model.model.language_model, backend="eager", fullgraph=True, dynamic=True)
    yield SimpleNamespace(model=model, decoder=decoder, plain=model.model.language_model)
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def prefill(setup, decoder, prompts, cache=None):
    """The decoder alone; the plan is made outside, as the model does."""
    ids, mask = pad(prompts, "left")
    mask = None if mask.all() else mask.bool()
    vision = ids == IMAGE
    targets, real = count_tokens(vision, mask)
    ratios = setup.plain.retention_ratios
    real = real or [ids.shape[1]] * len(ids)
    strengths = [1.0] * len(ratios)
    plan = RoutingPlan.from_counts(vision, mask, targets, real, ratios, coverage=strengths)
    embeddings = setup.model.get_input_embeddings()(ids)
    if cache is not None:
        adopt_cache(cache, MOD.mod_layers, 3)
    if mask is not None:
        mask = causal_mask(setup.plain.config, embeddings, 0, mask)
    inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "routing_plan": plan}
    return decoder(**inputs, use_cache=cache is not None, **{CACHE_ARGUMENT: cache}).last_hidden_state


@torch.no_grad()
def test_one_graph_for_every_prompt_length(compiled):
    for words, images in ((8, 1), (12, 1), (21, 1), (9, 2), (17, 2)):
        prompts = [prompt(images, words)]
        expected = prefill(compiled, compiled.plain, prompts)
        assert torch.equal(prefill(compiled, compiled.decoder, prompts), expected)
    assert graphs() == 1


@torch.no_grad()
def test_one_graph_for_padded_batches_of_one_size(compiled):
    for words in (8, 12, 21):
        prompts = [prompt(1, words), prompt(2, words + 5), prompt(0, words + 2)]
        expected = prefill(compiled, compiled.plain, prompts)
        torch.testing.assert_close(prefill(compiled, compiled.decoder, prompts), expected)
        seen = graphs()
    # Lengths that happen to be equal in the first prompt get one symbol, which another prompt may split once.
    assert seen <= 2


@torch.no_grad()
def test_decode_does_not_compile_anew_for_each_token_or_prompt(compiled):
    def turn(decoder, words):
        cache = DynamicCache(config=compiled.plain.config)
        results = [prefill(compiled, decoder, [prompt(1, words)], cache)]
        token = compiled.model.get_input_embeddings()(torch.tensor([[7]]))
        for _ in range(4):
            output = decoder(inputs_embeds=token, use_cache=True, **{CACHE_ARGUMENT: cache})
            results.append(output.last_hidden_state)
        return torch.cat(results, dim=1)

    torch.testing.assert_close(turn(compiled.decoder, 8), turn(compiled.plain, 8))
    first = graphs()
    for words in (11, 16, 23):
        torch.testing.assert_close(turn(compiled.decoder, words), turn(compiled.plain, words))
    assert first <= 4  # one for the prefill, one for decode, and one more each where sizes coincided
    assert graphs() == first


def test_training_compiles_with_its_backward_pass():
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(mod=MoDConfig([None, 0.6]), num_hidden_layers=2).train()
    setup = SimpleNamespace(model=model, plain=model.model.language_model)
    decoder = torch.compile(setup.plain, backend="aot_eager", fullgraph=True, dynamic=True)
    gradients = []
    for each in (setup.plain, decoder):
        model.zero_grad()
        prefill(setup, each, [prompt(1, 8)]).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in setup.plain.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    assert graphs() == 1
    torch._dynamo.reset()


def test_generate_with_a_compiled_decoder():
    """The user's way: `nn.Module.compile` in place, then `generate` as ever."""
    torch._dynamo.reset()
    model = tiny_model(mod=MOD, num_hidden_layers=3)
    prompts = [prompt(1, 6), prompt(2, 3)]
    ids, mask = pad(prompts, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3)}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
    expected = model.generate(**inputs, **options)
    decoder: nn.Module = model.model.language_model
    decoder.compile(backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(model.generate(**inputs, **options), expected)
    torch._dynamo.reset()
