"""Choice of tokens: by logit, exact ties spread evenly, padding never."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmod_cli.modeling.router import (
    GOLDEN_STEP,
    Router,
    coverage_term,
    grid_step,
    select_tokens,
    selection_keys,
    spread_rank,
)
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import IMAGE, pictures, prompt, tiny_model


def choose(logits, target, real, keep):
    keys = selection_keys(logits, target, real, spread_rank(target)[0])
    return select_tokens(keys, keep)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 60), share=st.floats(0, 1))
def test_keeps_the_largest_logits_and_all_text(seed, length, share):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, length, generator=generator)
    target = torch.rand(3, length, generator=generator) < 0.7
    real = torch.rand(3, length, generator=generator) < 0.9
    target &= real
    kept = [int(share * int(row.sum())) for row in target]
    keep = [k + int((row & ~t).sum()) for k, t, row in zip(kept, target, real, strict=True)]
    indices, valid = choose(logits, target, real, keep)
    for sample in range(3):
        slots = torch.ones_like(indices[sample], dtype=torch.bool) if valid is None else valid[sample]
        chosen = indices[sample][slots].tolist()
        vision = target[sample].nonzero().flatten().tolist()
        best = sorted(vision, key=lambda i: -float(logits[sample, i]))[: kept[sample]]
        text = (real & ~target)[sample].nonzero().flatten().tolist()
        assert chosen == sorted(best + text)
        assert len(set(indices[sample].tolist())) == indices.shape[1]


def test_extreme_logits_never_select_text_or_padding():
    """The release ranks by the normalised weight, in which a very low logit ties with padding."""
    logits = torch.tensor([[-50.0, -60.0, 0.0, -55.0, float("-inf"), 9.0]])
    target = torch.tensor([[True, True, False, True, True, False]])
    real = torch.tensor([[True, True, True, True, True, False]])
    indices, valid = choose(logits, target, real, [3])
    assert indices.tolist() == [[0, 2, 3]]
    assert valid is None


def test_zero_and_minus_zero_tie():
    target = torch.ones(1, 8, dtype=torch.bool)
    plus, minus = torch.zeros(1, 8), torch.tensor([[0.0, -0.0] * 4])
    assert choose(plus, target, None, [3])[0].tolist() == choose(minus, target, None, [3])[0].tolist()


@pytest.mark.parametrize("layer", [0, 1, 17, 31])
@pytest.mark.parametrize("width", [10, 24])
@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5, 0.85])
@pytest.mark.parametrize("known", [False, True], ids=["golden", "grid"])
def test_ties_are_spread_evenly_over_rows_columns_and_quarters(known, width, ratio, layer):
    step = grid_step(width) if known else GOLDEN_STEP
    count = width * width
    keep = math.trunc(count * ratio)
    target = torch.tensor([[True] * count + [False] * 4])
    keys = selection_keys(torch.zeros(1, count + 4), target, None, spread_rank(target, 32, step)[layer])
    indices, _ = select_tokens(keys, [keep + 4])
    grid = torch.zeros(count)
    grid[indices[0][:-4]] = 1
    grid = grid.view(width, width)
    assert grid.sum() == keep
    half = width // 2
    quarters = torch.stack([grid[:half, :half], grid[:half, half:], grid[half:, :half], grid[half:, half:]])
    assert (quarters.sum(dim=(1, 2)) - keep / 4).abs().max() <= max(
        2 if layer == 0 else 3, 0.03 * half * half
    )
    for lines in (grid.mean(0), grid.mean(1)):
        assert (lines - ratio).abs().max() < 0.21


def test_a_known_grid_is_covered_more_evenly():
    """By the largest deviation of the number kept in any rectangle that begins at the corner."""

    def worst(width, ratio, step):
        target = torch.ones(1, width * width, dtype=torch.bool)
        kept = spread_rank(target, 8, step)[:, 0].argsort(-1)[:, : math.trunc(width * width * ratio)]
        grids = torch.zeros(8, width * width).scatter(1, kept, 1.0).view(8, width, width) - ratio
        return float(grids.cumsum(1).cumsum(2).abs().amax((1, 2)).mean())

    for width in (10, 24):
        golden, known = (
            sum(worst(width, ratio, step) for ratio in (0.08, 0.15, 0.3, 0.5))
            for step in (GOLDEN_STEP, grid_step(width))
        )
        assert known < 0.97 * golden
        assert grid_step(width) * width % 2**32 / 2**32 == pytest.approx(0.56984, abs=1e-4)
    assert tiny_model("llava").model.language_model.token_step == grid_step(5)
    assert tiny_model("llava_next").model.language_model.token_step == GOLDEN_STEP


def test_layers_keep_other_tokens_of_a_tie():
    """At 8 % the same few in each of 8 layers would show an eighth of the picture; shifted, they show most of it."""
    target = torch.ones(1, 100, dtype=torch.bool)
    ranks = spread_rank(target, 8)
    kept = [set(rank[0].topk(8, largest=False).indices.tolist()) for rank in ranks]
    assert len(set.union(*kept)) > 50
    assert torch.equal(spread_rank(target)[0], ranks[0])


def order(logits, strength, layers=1, layer=0):
    """Routed tokens in the order in which a layer keeps them."""
    target = torch.ones(1, logits.numel(), dtype=torch.bool)
    rank = spread_rank(target, layers)
    term = coverage_term(rank, torch.full((layers,), float(strength)))
    keys = selection_keys(logits[None], target, None, rank[layer], term[layer])
    return keys[0].argsort(descending=True).tolist()


def test_coverage_goes_from_the_logits_order_to_the_even_one():
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0))
    even = spread_rank(torch.ones(1, 200, dtype=torch.bool), 8)[3, 0]
    assert order(logits, 0, 8, 3) == logits.argsort(descending=True).tolist()
    assert order(logits, 1e7, 8, 3) == even.argsort().tolist()
    between = order(logits, 3, 8, 3)[:40]
    # Of a strength like the spread of the logits, both matter.
    assert logits[between].mean() > logits.mean() + 0.3
    assert even[between].float().mean() < 0.35 * 2**32
    for zero in (torch.zeros(200), -torch.zeros(200)):
        assert order(zero, 1, 8, 3) == even.argsort().tolist()


def test_coverage_by_hand():
    """Golden ratio and 0.137 of a layer, modulo 1, to the last bit of fp32."""
    rank = spread_rank(torch.ones(1, 3, dtype=torch.bool), 2)
    term = coverage_term(rank, torch.tensor([2.0, 0.5]))
    golden = (math.sqrt(5) - 1) / 2
    for layer, strength in enumerate((2.0, 0.5)):
        places = [(token * golden + layer * 0.137) % 1 for token in range(3)]
        assert term[layer, 0].tolist() == pytest.approx([-strength * place for place in places], abs=1e-6)
    assert torch.equal(term * 2**25, (term * 2**25).round())  # exact, so the same on every device
    assert not torch.signbit(coverage_term(rank, torch.zeros(2))).any()


@pytest.mark.parametrize("ratio", [0.08, 0.3])
def test_coverage_gives_each_picture_its_share(ratio):
    """The sequence goes on over all pictures of a sample, and every stretch of it is as even."""
    for layer in range(8):
        kept = order(torch.zeros(4 * 576), 1, 8, layer)[: math.trunc(4 * 576 * ratio)]
        shares = [sum(picture * 576 <= token < (picture + 1) * 576 for token in kept) for picture in range(4)]
        assert max(abs(share - 576 * ratio) for share in shares) <= 3


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_random_choice_follows_neither_logits_nor_pattern(kernels):
    model = tiny_model(mod=MoDConfig([None, *[0.2] * 7], choice="random"))
    model.model.language_model.kernels = kernels
    ids = torch.tensor([prompt(1, 6)] * 2)

    def kept(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            routing = model(ids, pixel_values=pictures(2), output_routing=True).routing
        assert routing[0] is None
        return torch.stack([layer.kept for layer in routing[1:]])

    first = kept(1)
    assert torch.equal(first, kept(1))
    assert first[..., ids[0] != IMAGE].all()
    vision = torch.stack([kept(seed) for seed in range(30)])[..., ids[0] == IMAGE]
    assert (vision.sum(-1) == 5).all()
    # 30 x 2 x 7 draws of a share of 0.2: every token comes up, in each layer and sample other ones.
    assert ((vision.float().mean((0, 1, 2)) - 0.2).abs() < 0.06).all()
    assert not torch.equal(vision[0, 0], vision[0, 1])
    assert not torch.equal(vision[0, 0, 0], vision[0, 0, 1])


def test_ties_choose_nested_sets():
    target = torch.ones(1, 100, dtype=torch.bool)
    sets = [set(choose(torch.zeros(1, 100), target, None, [keep])[0][0].tolist()) for keep in range(1, 101)]
    assert all(small < large for small, large in pairwise(sets))


def test_half_precision_ranks_in_full_precision():
    """bf16 has so few values near 1 that hundreds of tokens would tie; the logits must not be rounded to it."""
    router = Router(256, MoDConfig([0.5])).to(torch.bfloat16)
    torch.nn.init.normal_(router.weight, std=0.02)
    hidden = torch.randn(1, 576, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(hidden)
    assert logits.dtype == torch.float32
    assert logits.unique().numel() > 570
    assert logits.bfloat16().unique().numel() < 500


@pytest.mark.parametrize("norm", ["tanh", "sigmoid", "softmax", "none"])
def test_fresh_router_starts_at_the_baseline(norm):
    router = Router(8, MoDConfig([0.5], weight_norm=norm))
    target = torch.tensor([[True, True, False]])
    hidden = torch.randn(1, 3, 8)
    weights = router.weights(router(hidden), target)
    start = {"tanh": 1.0, "sigmoid": 1.1, "softmax": 1.1, "none": 1.0}[norm]
    assert weights.tolist()[0] == pytest.approx([start, start, 1.0])


def test_softmax_of_a_sample_without_targets_is_finite():
    router = Router(8, MoDConfig([0.5], weight_norm="softmax"))
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    target = torch.tensor([[True, True, False, True], [False] * 4])
    weights = router.weights(router(hidden), target)
    weights.sum().backward()
    assert torch.equal(weights[1], torch.ones(4))
    assert torch.isfinite(hidden.grad).all()
