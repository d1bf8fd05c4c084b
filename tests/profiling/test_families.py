"""Formula, fvcore's trace and torch's own counter agree on every family, and so do tokens and processors."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pmod_cli.families.processing import picture_ids
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.modeling.twin import meta_model
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.geometry import Geometry, shipped_geometries
from pmod_cli.profiling.latency import make_inputs
from pmod_cli.profiling.prompt import Workload, default_image_size, image_tokens
from pmod_cli.profiling.subject import Variant, find_subject
from pmod_cli.visualize.layout import lay_out
from tests.common.family_models import MAKERS, pmod_of

MOD = MoDConfig([None, 0.5, 0.5, 0.5])
SIZE = (20, 36)


@pytest.fixture(scope="module", params=MAKERS)
def made(request):
    dense, processor = MAKERS[request.param]()
    pictures = processor.image_processor.to_dict()
    raw = dense.config.to_dict()
    return dense, processor, Variant(request.param, raw, MOD, None, pictures)


def workload(geometry, **changes):
    return Workload(image_tokens(geometry, SIZE), SIZE, dtype="float32", **changes)


def test_the_three_counts_agree(made):
    pytest.importorskip("fvcore")
    from pmod_cli.profiling import fvcore_counter

    dense, _, variant = made
    geometry, work = variant.geometry, workload(variant.geometry, batch=2, all_logits=False)
    count = closed_form.prefill(geometry, variant.mod, work)
    assert fvcore_counter.trace(variant, work) == (
        count,
        closed_form.decode_step(geometry, variant.mod, work),
    )
    model = pmod_of(dense, MOD.retention_ratios)
    assert sum(p.numel() for p in model.parameters()) == sum(
        closed_form.parameters(geometry, variant.mod).values()
    )
    model.set_attn_implementation("eager")  # its products are all matrix multiplications
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**make_inputs(model, work), logits_to_keep=1)
    counts = counter.get_flop_counts()
    counted = sum(counts["Global"].values())
    # Llama's angles are made by a matrix multiplication; torch does not count norms, or the router's as one matrix.
    counted -= sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(".rotary_emb"))
    norms = (
        count.vision_norms
        + 5
        * work.batch
        * work.image.crops
        * geometry.projector.normed
        * geometry.tower.rows(work.image.patches)
    )
    assert counted / 2 == count.macs - norms


def test_pictures_and_their_patches_are_the_processors(made):
    dense, processor, variant = made
    rng, token = random.Random(0), dense.config.image_token_id
    for _ in range(25):
        height, width = rng.randint(4, 70), rng.randint(4, 70)
        [ids] = picture_ids(processor, [(width, height)])
        assert image_tokens(variant.geometry, (height, width)).tokens == ids.count(token)
        layout = lay_out(dense, processor.image_processor, (width, height))
        assert layout.tokens == ids.count(token)
        seen = sorted(int(place) for view in layout.views for place in view.tokens.flat)
        assert seen == list(range(layout.tokens))


@pytest.mark.parametrize("name", [name for name in shipped_geometries() if not name.startswith("llava")])
def test_shipped_sizes(name):
    """As many parameters as the hub's checkpoints have, and what transformers makes of the same config."""
    subject = find_subject(name)
    geometry = subject.dense.geometry
    assert sum(closed_form.parameters(geometry, None).values()) == PARAMETERS[name]
    size = default_image_size(geometry)
    work = Workload(image_tokens(geometry, size), size)
    ratio = (
        closed_form.prefill(geometry, subject.pmod.mod, work).macs
        / closed_form.prefill(geometry, None, work).macs
    )
    assert 0.5 < ratio < 1


PARAMETERS = {
    "internvl3-1b": 938_193_024,
    "internvl3-8b": 7_944_373_760,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "smolvlm2-2.2b": 2_246_784_880,
    "smolvlm2-256m": 256_484_928,
    "smolvlm2-500m": 507_482_304,
}


@pytest.mark.parametrize(("name", "tokens"), [("qwen2.5-vl-7b", 37 * 27), ("qwen3-vl-8b", 32 * 24)])
def test_tokens_of_a_picture(name, tokens):
    assert image_tokens(find_subject(name).dense.geometry, (768, 1024)).tokens == tokens


def test_layers_with_deepstack_stay_dense():
    ratios = find_subject("qwen3-vl-2b", overrides=["mod.schedule=constant"]).pmod.mod.retention_ratios
    assert ratios[:3] == [None] * 3
    assert ratios[3] == 0.5


def test_a_tower_is_traced_as_transformers_runs_it():
    """Windows of 8 x 8 patches: as many query-key pairs as the tower's own cuts have."""
    from transformers.vision_utils import get_vision_window_index

    tower = find_subject("qwen2.5-vl-3b").dense.geometry.tower
    for grid in ((54, 74), (16, 16), (2, 100), (36, 8)):
        thw = torch.tensor([[1, *grid]])
        _, ends = get_vision_window_index(thw, spatial_merge_size=2, window_size=112, patch_size=14)
        lengths = torch.unique_consecutive(ends).diff()
        full = grid[0] * grid[1]
        assert tower.pairs(grid) == 28 * int((lengths**2).sum()) + 4 * full**2


def test_meta_models_are_of_the_family():
    variant = find_subject("smolvlm2-256m").pmod
    assert type(meta_model(variant.config, "bfloat16")).__name__ == "PmodSmolVLMForConditionalGeneration"


def test_settings_of_the_image_processor_count(made):
    _, _, variant = made
    changed = {**variant.pictures, "size": {**(variant.pictures.get("size") or {}), "longest_edge": 16 * 16}}
    changed |= {"max_patches": 1, "do_image_splitting": False}
    assert (
        image_tokens(Geometry.from_config(variant.raw, changed), (60, 60)).tokens
        < image_tokens(variant.geometry, (60, 60)).tokens
    )
