"""Each fused kernel against its PyTorch reference, run by `test_kernels` in a process of its own.

On a GPU natively; elsewhere in Triton's interpreter, where a store out of bounds kills the process.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import set_seed

from pmod_cli.modeling.kernels import add_norm, gather, launch, route, scatter, select
from pmod_cli.modeling.router import coverage_term, spread_rank
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pad, pictures, prompt, tiny_model
from tests.modeling.test_layer_reference import test_output_and_choice, variants

test_output_and_choice.__test__ = False  # called here, for the cases wanted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 16), (1, 37, 48), (3, 29, 33), (2, 70, 64)]


def close(actual, expected, dtype):
    """Kernels add in another order: one rounding of the dtype, and fp32's own noise."""
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(actual, expected, atol=2 * unit, rtol=2 * unit, equal_nan=True)


def same(actual, expected):
    """Bit for bit; but Triton's interpreter cuts where it should round to bfloat16, once for each step."""
    if DEVICE == "cpu" and actual.dtype == torch.bfloat16:
        torch.testing.assert_close(actual, expected, atol=2**-6, rtol=2**-6, equal_nan=True)
    else:
        assert torch.equal(actual, expected)


def masks(batch, tokens, seed=0):
    """Routed tokens (none in the last sample) and real ones, with padding on both sides."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, tokens, generator=generator) < 0.6
    if batch > 1:
        target[-1] = False
    real = torch.ones(batch, tokens, dtype=torch.bool)
    if tokens > 8:
        real[0, :3], real[-1, -2:] = False, False
    return (target & real).to(DEVICE), real.to(DEVICE)


def hidden_states(batch, tokens, width, dtype, seed=0):
    set_seed(seed)
    return torch.randn(batch, tokens, width).to(DEVICE, dtype)


def test_this_process_runs_the_kernels():
    assert launch.available()
    assert launch.INTERPRETED is (DEVICE == "cpu")


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [*((norm, torch.float32) for norm in route.NORMS), *(("tanh", half) for half in DTYPES[1:])],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_route(shape, dtype, norm):
    batch, tokens, width = shape
    hidden = hidden_states(*shape, dtype)
    weight, bias = torch.randn(1, width).to(hidden) * 0.3, torch.tensor([0.1]).to(hidden)
    target, real = masks(batch, tokens)
    rank = spread_rank(target)[0]
    term = coverage_term(rank[None], torch.tensor([0.7], device=DEVICE))[0]
    # All options with each other at one shape and norm; elsewhere all together and none.
    options = itertools.product((True, False), (True, False), (term, None))
    if (shape, norm, dtype) != (SHAPES[2], "tanh", torch.float32):
        options = [(True, True, term), (False, False, None)]
    for with_bias, with_real, coverage in options:
        arguments = (hidden, weight, bias if with_bias else None, target, real if with_real else None, rank)
        arguments = (*arguments, coverage)
        logits, weights, keys, passed = route.route(*arguments, norm=norm, offset=1.0, scale=0.2)
        expected = route.reference(*arguments, route.NORMS.index(norm), 1.0, 0.2)
        close(logits, expected[0], torch.float32)
        close(weights, expected[1], torch.float32)
        # The rest follows from the kernel's own logits and weights, exactly.
        assert torch.equal(keys, route.selection_keys(logits, target, arguments[4], rank, coverage))
        same(passed, hidden * weights.to(dtype)[..., None])


def test_route_of_ties_zeros_infinities_and_nan():
    hidden = torch.zeros(1, 12, 16, device=DEVICE)
    hidden[0, 3], hidden[0, 4], hidden[0, 5] = float("nan"), float("inf"), float("-inf")
    hidden[0, 6], hidden[0, 7] = -0.0, 1e4
    target = torch.ones(1, 12, dtype=torch.bool, device=DEVICE)
    weight, rank = torch.ones(1, 16, device=DEVICE), spread_rank(target)[0]
    for norm in route.NORMS:
        arguments = (hidden, weight, None, target, None, rank, None)
        actual = route.route(*arguments, norm=norm, offset=1.0, scale=0.2)
        expected = route.reference(*arguments, route.NORMS.index(norm), 1.0, 0.2)
        for mine, theirs in zip(actual[:2], expected[:2], strict=True):
            close(mine, theirs, torch.float32)
        assert torch.equal(actual[2], expected[2])
        close(actual[3], expected[3], torch.float32)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 100, 513])
def test_select(tokens):
    generator = torch.Generator().manual_seed(tokens)
    target, real = masks(4, tokens, seed=tokens)
    # Few distinct logits: most are ties, broken by rank.
    logits = torch.randint(-2, 3, (4, tokens), generator=generator).float().to(DEVICE)
    keys = route.selection_keys(logits, target, real, spread_rank(target)[0])
    text, routed = (real & ~target).sum(-1), target.sum(-1)
    for share in (0.0, 0.15, 0.5, 1.0):
        lengths = (text + (routed * share).int()).to(torch.int32)
        slots = int(lengths.max())
        if slots == 0:
            continue
        indices = select.select(keys, lengths, slots)
        expected = select.reference(keys, lengths, slots)
        for sample, length in enumerate(lengths.tolist()):
            assert torch.equal(indices[sample, :length], expected[sample, :length])
            chosen = indices[sample].tolist()
            assert len(set(chosen)) == slots
            assert min(chosen) >= 0
            assert max(chosen) < tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_add_norm_and_scatter(shape, dtype):
    batch, tokens, width = shape
    hidden = hidden_states(*shape, dtype)
    weight = torch.rand(width).to(hidden)
    slots = max(tokens // 2, 1)
    indices = torch.stack([torch.randperm(tokens)[:slots].sort().values for _ in range(batch)]).to(DEVICE)
    for tables in (1, batch):
        cos, sin = (torch.randn(tables, tokens, 12).to(hidden) for _ in range(2))
        actual = gather.gather(hidden, indices, weight, 1e-5, cos, sin)
        expected = gather.reference(hidden, indices, weight, 1e-5, cos, sin)
        for mine, theirs, exact in zip(actual, expected, (True, False, True, True), strict=True):
            assert torch.equal(mine, theirs) if exact else close(mine, theirs, dtype) is None
    kept, branch = actual[0], torch.randn_like(actual[0])
    total, normed = add_norm.add_norm(kept, branch, weight, 1e-5)
    same(total, kept + branch)
    close(normed, add_norm.reference(kept, branch, weight, 1e-5)[1], dtype)
    weights = torch.rand(batch, tokens, device=DEVICE) + 0.5
    lengths = torch.tensor(
        [max(slots - sample, 0) for sample in range(batch)], dtype=torch.int32, device=DEVICE
    )
    mine, theirs = hidden.clone(), hidden.clone()
    scatter.scatter(mine, total, branch, weights, indices, lengths)
    scatter.reference(theirs, total, branch, weights, indices, lengths)
    close(mine, theirs, dtype)
    for sample in range(batch):
        untouched = set(range(tokens)) - set(indices[sample, : lengths[sample]].tolist())
        rows = torch.tensor(sorted(untouched), dtype=torch.long, device=DEVICE)
        assert torch.equal(mine[sample, rows], hidden[sample, rows])


@pytest.mark.parametrize("case", ["layer_b1_nopad", "layer_gqa_b1"])
def test_recorded_layers(case):
    """The released code's outputs, by the kernels themselves."""
    for each, variant in variants():
        if each == case and DEVICE == "cpu":
            test_output_and_choice(case, variant, "fused")


def test_a_whole_model():
    mod = MoDConfig([0.5, None, 0.0, 1.0], weight_norm="sigmoid", coverage=2.0)
    model = tiny_model(mod=mod, num_hidden_layers=4).to(DEVICE)
    ids, mask = (each.to(DEVICE) for each in pad([prompt(1, 3), prompt(0, 3)], "left"))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(1).to(DEVICE)}
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    results = {}
    for kernels in ("torch", "fused"):
        model.model.language_model.kernels = kernels
        with torch.no_grad():
            logits = model(**inputs).logits[mask.bool()]
        results[kernels] = logits, model.generate(**inputs, **options)
    torch.testing.assert_close(results["fused"][0], results["torch"][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(results["fused"][1], results["torch"][1])
