"""The parts of a calibration, each against what it should equal."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from pmod_cli.calibration.fit import Moments, fit
from pmod_cli.calibration.measure import measure
from pmod_cli.calibration.observe import observing
from pmod_cli.calibration.reference import answered
from pmod_cli.calibration.routable import Routable
from pmod_cli.calibration.schedules import LEAST, scaled, search, shapes
from pmod_cli.calibration.selection import Selection, controls
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import IMAGE, dense_counterpart, pad, pictures, prompt, tiny_model


def routable_of(dense, **settings):
    layers = dense.config.text_config.num_hidden_layers
    data = dense.config.to_dict() | {"mod": MoDConfig([1.0] * layers, **settings).to_dict()}
    kind = f"pmod_{data.pop('model_type')}"
    return Routable.of(dense, AutoConfig.for_model(kind, **data))


def inputs_of(prompts, side="left"):
    ids, mask = pad(prompts, side)
    images = sum(each.count(IMAGE) for each in prompts) // 25
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(images)}


@pytest.fixture(scope="module")
def dense():
    model = dense_counterpart(tiny_model())
    model.generation_config.eos_token_id = None
    return model


PROMPTS = [prompt(1, 9, seed=1), prompt(1, 5, seed=2), prompt(1, 7, seed=3)]


def test_dense_routed_and_mixed_run_on_the_same_tensors(dense):
    routable, inputs = routable_of(dense), inputs_of(PROMPTS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = dense(**inputs).logits[real]
    with routable.dense() as model:
        torch.testing.assert_close(model(**inputs).logits[real], expected)
    ratios = [None, 0.5, None, 0.2] * 2
    with routable.routed(ratios) as model:
        output = model(**inputs, output_routing=True)
    assert [each is None for each in output.routing] == [ratio is None for ratio in ratios]
    direct = tiny_model(mod=MoDConfig(ratios))
    routers = {name: torch.zeros_like(v) for name, v in direct.state_dict().items() if ".router." in name}
    direct.load_state_dict(dense.state_dict() | routers)
    with torch.no_grad():
        torch.testing.assert_close(output.logits[real], direct(**inputs).logits[real])
    shared = {parameter.data_ptr() for parameter in dense.parameters()}
    own = {parameter.data_ptr() for router in routable.routers for parameter in router.parameters()}
    assert {parameter.data_ptr() for parameter in routable.model.parameters()} == shared | own


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_attention_is_what_eager_attention_computes(decoder, side):
    model = dense_counterpart(tiny_model(decoder=decoder))
    prompts = [prompt(1, 9, seed=1), prompt(2, 5, seed=2)]
    inputs = inputs_of(prompts, side)
    routable, seen, scored = routable_of(model), {}, {}
    before = routable.decoder.config._attn_implementation
    with routable.dense() as routed, observing(routable.decoder, seen.__setitem__, scored.__setitem__):
        routed(**inputs)
    assert routable.decoder.config._attn_implementation == before
    assert not hasattr(routable.decoder.layers[0].self_attn, "observed")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    vision, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    for layer in range(8):
        torch.testing.assert_close(seen[layer], output.hidden_states[layer][vision], atol=1e-4, rtol=1e-4)
        rows = []
        for sample in range(len(prompts)):
            last = int(vision[sample].nonzero().max())
            text = real[sample] & (torch.arange(vision.shape[1]) > last)
            mean = output.attentions[layer][sample].mean(0)
            rows.append(mean[text][:, vision[sample]].mean(0))
        torch.testing.assert_close(scored[layer], torch.cat(rows), atol=1e-6, rtol=1e-4)


def test_a_fit_finds_what_there_is_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(16, generator=generator)

    def moments(noise, meaning=1.0):
        found = Moments()
        for _ in range(4):
            x = torch.randn(300, 16, generator=generator) * torch.linspace(0.1, 30, 16) + 5
            y = meaning * (x @ true) + noise * torch.randn(300, generator=generator)
            found.add(x.to(torch.bfloat16).float(), y)
        return found

    fitted = fit(moments(1.0), moments(1.0))
    assert fitted is not None
    assert fitted.explained > 0.99
    assert torch.nn.functional.cosine_similarity(fitted.weight, true, dim=0) > 0.99
    x = torch.randn(4000, 16, generator=generator) * torch.linspace(0.1, 30, 16) + 5
    logits = x @ fitted.weight + fitted.bias
    assert float(logits.mean()) == pytest.approx(0, abs=0.1)
    assert float(logits.std()) == pytest.approx(1, abs=0.1)
    assert fit(moments(1.0, meaning=0.0), moments(1.0, meaning=0.0)) is None


@torch.no_grad()
def test_outcomes_are_those_of_greedy_answers(dense):
    """Teacher-forced over the dense answer, or generated: the same tokens agree."""
    routable, inputs = routable_of(dense), inputs_of([prompt(1, 6, seed=s) for s in range(12)])
    batch = answered(routable, inputs, 0, 5)
    expected = dense.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(batch.answer, expected[:, inputs["input_ids"].shape[1] :])
    alike = measure(routable, [batch], [None] * 8, Selection("dense"))
    assert alike.agreement.tolist() == [1.0] * 12
    assert alike.divergence.max() < 1e-3  # kept in half precision
    ratios = [None, *[0.3] * 7]
    outcome = measure(routable, [batch], ratios, Selection("shifted spread"))
    with routable.routed(ratios) as model:
        routed = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    same = (routed == expected).all(-1).float()
    assert outcome.agreement.tolist() == same.tolist()
    assert 0 < same.sum() < 12
    assert outcome.divergence.min() > 0
    again = answered(routable, inputs, 0, 5, batch.answer)
    torch.testing.assert_close(again.logprobs, batch.logprobs)


@torch.no_grad()
def test_answers_end_at_the_end_of_sequence(dense):
    routable, inputs = routable_of(dense), inputs_of([prompt(1, 6, seed=s) for s in range(4)])
    free = answered(routable, inputs, 0, 6)
    end = int(free.answer[0, 1])
    routable.model.generation_config.eos_token_id = end
    batch = answered(routable, inputs, 0, 6)
    routable.model.generation_config.eos_token_id = None
    assert batch.asked.sum(1).tolist()[0] <= 2
    for row, asked in zip(batch.answer.tolist(), batch.asked.tolist(), strict=True):
        said = [token for token, inside in zip(row, asked, strict=True) if inside]
        assert end not in said[:-1]
    assert len(batch.logprobs) == int(batch.asked.sum())


def test_controls_choose_as_their_names_say(dense):
    routable, inputs = routable_of(dense), inputs_of(PROMPTS)
    kept = {}
    for control in controls():
        with control.on(routable, [0.2] * 8) as model:
            routing = model(**inputs, output_routing=True).routing
        kept[control.name] = [layer.kept[0].nonzero().flatten().tolist() for layer in routing]
    assert all(chosen == kept["same spread"][0] for chosen in kept["same spread"])
    assert kept["shifted spread"][0] == kept["same spread"][0]
    for name in ("shifted spread", "random"):
        assert len(set(map(tuple, kept[name]))) > 4
    assert kept["random"] != kept["shifted spread"]


def cost(ratios):
    return sum(1.0 if ratio is None else ratio for ratio in ratios) / len(ratios)


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.55, 0.9])
def test_shapes_cost_the_budget(budget):
    found = shapes(16, budget, cost)
    assert set(found) == {"paper", "linear", "constant"}
    for ratios in found.values():
        assert budget - 0.1 < cost(ratios) <= budget
        routed = [1.0 if ratio is None else ratio for ratio in ratios]
        assert routed == sorted(routed, reverse=True)
        assert min(routed) >= LEAST
    assert shapes(16, LEAST / 2, cost) == {}
    doubled = scaled([None, 0.1, 0.2, 0.3], 0.55, cost)
    assert doubled == pytest.approx([None, 0.2, 0.4, 0.6])
    assert scaled([None, 0.1], 0.5, cost) is None


def test_the_search_gives_tokens_to_the_layers_that_need_them():
    need = [1.0, 20.0, 1.0, 5.0]

    def loss(ratios):
        return sum(n * (1 - (1.0 if r is None else r)) ** 4 for n, r in zip(need, ratios, strict=True))

    constant = [0.3] * 4
    found = search(constant, 0.3, cost, loss)
    assert cost(found) <= 0.3 + 1e-9
    assert loss(found) < loss(constant)
    assert (found[1] or 1.0) >= (found[3] or 1.0) > (found[0] or 1.0)
