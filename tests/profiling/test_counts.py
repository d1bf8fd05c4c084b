"""Two independent counts (formula and fvcore's trace) agree, part by part and layer by layer."""

import dataclasses

import pytest

from pmod_cli.modeling.twin import meta_model
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.closed_form import PAPER
from pmod_cli.profiling.prompt import Workload, default_image_size, image_tokens
from tests.common.profiling_models import dense_config, geometry, paper_mod, pmod_config


def workload(shape, **changes):
    size = default_image_size(shape)
    return Workload(image_tokens(shape, size), size, **changes)


def language_model(count):
    return count.macs - sum(count.parts[part] for part in ("vision_tower", "vision_norms", "projector"))


@pytest.mark.parametrize(
    ("name", "vision", "crops", "decoder", "fvcore"),
    [
        ("llava-1.5-7b", 576, 1, 4_134_948_306_944, 4_330_183_681_024),
        ("llava-next-7b", 2928, 5, 21_879_005_904_896, 22_855_182_775_296),
    ],
)
def test_published_counts_of_7b(name, vision, crops, decoder, fvcore):
    work = workload(geometry(name))
    assert (work.vision_tokens, work.image.crops, work.text_tokens) == (vision, crops, 35)
    count = closed_form.prefill(geometry(name), None, work)
    assert language_model(count) == decoder
    assert count.macs == fvcore


def test_fvcore_counts_all_of_llava_next_7b():
    pytest.importorskip("fvcore")
    from pmod_cli.profiling import fvcore_counter

    model = meta_model(dense_config("llava-next-7b"), "bfloat16")
    prefill, _ = fvcore_counter.count(model, workload(geometry("llava-next-7b")))
    assert (language_model(prefill), prefill.macs) == (21_879_005_904_896, 22_855_182_775_296)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-next-mistral-7b", 7_566_747_648),
        ("llava-next-llama3-8b", 8_355_276_800),
        ("llava-onevision-7b", 8_030_807_584),
        ("llava-onevision-0.5b", 893_675_552),
    ],
)
def test_parameters_of_the_hubs_checkpoints(name, parameters):
    assert sum(closed_form.parameters(geometry(name), None).values()) == parameters


def test_fvcore_counts_layer_norms():
    work = workload(geometry("llava-1.5-7b"))
    count = closed_form.prefill(geometry("llava-1.5-7b"), None, work)
    assert count.parts["vision_norms"] == 138_849_280


@pytest.mark.parametrize("routed", [False, True], ids=["dense", "p-mod"])
@pytest.mark.parametrize(
    ("name", "layers", "target", "work"),
    [
        ("llava-1.5-7b", 32, "vision", {}),
        ("llava-next-7b", 6, "vision_hr", {"batch": 2, "all_logits": False}),
        ("llava-next-34b", 6, "all", {"text_tokens": 10}),
        ("llava-onevision-0.5b", 6, "vision", {}),
    ],
)
def test_both_counts_agree(name, layers, target, work, routed):
    pytest.importorskip("fvcore")
    from pmod_cli.profiling import fvcore_counter

    shape = geometry(name, layers)
    mod = paper_mod(layers, target_tokens=target) if routed else None
    config = pmod_config(name, mod) if mod else dense_config(name, layers)
    load = workload(shape, **work)
    model = meta_model(config, load.dtype)
    prefill, step = fvcore_counter.count(model, load)
    assert prefill == closed_form.prefill(shape, mod, load)
    assert step == closed_form.decode_step(shape, mod, load)
    assert sum(p.numel() for p in model.parameters()) == sum(closed_form.parameters(shape, mod).values())


@pytest.mark.parametrize(
    ("name", "dense", "pmod"),
    [("llava-1.5-7b", 8.38, 4.93), ("llava-next-7b", 39.46, 21.92)],
)
def test_paper_convention(name, dense, pmod):
    shape = geometry(name)
    work = workload(shape, text_tokens=30)
    for mod, tera in ((None, dense), (paper_mod(32), pmod)):
        assert round(2 * closed_form.prefill(shape, mod, work, PAPER).macs / 1e12, 2) == tera


def test_grouped_queries_shrink_projections_and_cache():
    shape = geometry("llava-next-34b")
    work = workload(shape)
    assert (shape.decoder.heads, shape.decoder.kv_heads) == (56, 8)
    layer = closed_form.prefill(shape, None, work).layers[0]
    assert layer.attention_projections == work.prompt_tokens * 7168 * (2 * 7168 + 2 * 1024)
    assert closed_form.kv_bytes(shape, None, work)[0] == 2 * work.prompt_tokens * 8 * 128 * 2


def test_generation_is_the_sum_of_its_steps():
    shape, mod = geometry("llava-1.5-7b"), paper_mod(32)
    work = workload(shape, new_tokens=6)
    steps = sum(closed_form.decode_step(shape, mod, work, step=step).macs for step in range(5))
    assert closed_form.generation_macs(shape, mod, work) == closed_form.prefill(shape, mod, work).macs + steps
    one = dataclasses.replace(work, new_tokens=1)
    assert closed_form.generation_macs(shape, mod, one) == closed_form.prefill(shape, mod, one).macs


def test_text_only_prompt_runs_dense():
    shape = geometry("llava-1.5-7b")
    work = Workload(None, None, text_tokens=50)
    assert closed_form.prefill(shape, paper_mod(32), work) == closed_form.prefill(shape, None, work)


def test_traffic_never_exceeds_what_is_stored():
    shape, mod = geometry("llava-1.5-7b"), paper_mod(32)
    work = workload(shape)
    weights = 2 * sum(closed_form.parameters(shape, mod).values())
    cache = sum(closed_form.kv_bytes(shape, mod, work))
    table = 2 * shape.decoder.vocab * shape.decoder.hidden
    traffic = closed_form.least_traffic(shape, mod, work)
    assert traffic["prefill"] == weights - table + 2 * work.text_tokens * shape.decoder.hidden + cache
    assert traffic["decode_step"] < traffic["prefill"]
