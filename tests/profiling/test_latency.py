"""Measuring: real models, real caches. No test here depends on how long anything takes."""

import pytest
import torch

from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.latency import make_inputs, measure
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.placement import load_models
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.subject import find_subject
from tests.common.profiling_models import TINY_MOD, profile_checkpoint, save_tiny


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llava", {"dtype": "float32"}),
        ("llava", {"dtype": "bfloat16", "batch": 3, "text_tokens": 7}),
        ("llava_next", {"dtype": "float32", "batch": 2, "image_size": "31x20"}),
        ("llava", {"dtype": "float32", "no_image": True}),
    ],
)
def test_real_cache_has_the_counted_bytes_in_every_layer(tmp_path, model_type, options):
    save_tiny(tmp_path, model_type, mod=TINY_MOD)
    result = profile_checkpoint(tmp_path, latency=True, repeats=1, new_tokens=4, counter="formula", **options)
    for role in ("pmod", "dense"):
        counted, real = result[role], result["latency"]["models"][role]
        assert real["kv_cache"] == counted["kv_cache"]
        assert set(real["seconds"]) == {"first_prefill", "prefill", "decode", "end_to_end"}
    if not options.get("no_image"):
        assert result["pmod"]["kv_cache"]["prefill_bytes"] < result["dense"]["kv_cache"]["prefill_bytes"]


def test_dense_view_is_the_baseline_on_the_same_tensors(tmp_path):
    saved = save_tiny(tmp_path, mod=TINY_MOD)
    models = load_models(find_subject(str(tmp_path)), torch.device("cpu"), "float32")
    pmod, dense = models["pmod"], models["dense"]
    assert not any("router" in name for name, _ in dense.named_parameters())
    ours, theirs = dense.lm_head.weight, pmod.lm_head.weight
    assert ours.data_ptr() == theirs.data_ptr()
    assert torch.equal(theirs, saved.lm_head.weight)
    work = Workload(None, None, text_tokens=9)
    inputs = make_inputs(dense, work)
    # Without an image nothing is routed, so the two must give the very same logits.
    with torch.no_grad():
        assert torch.equal(dense(**inputs).logits, pmod(**inputs).logits)


def test_dense_view_differs_from_p_mod_where_tokens_are_dropped(tmp_path):
    save_tiny(tmp_path, mod=TINY_MOD)
    subject = find_subject(str(tmp_path))
    models = load_models(subject, torch.device("cpu"), "float32")
    work = ProfileOptions(dtype="float32").workload(subject.main.geometry)
    inputs = make_inputs(models["dense"], work)
    assert int((inputs["input_ids"] == 60).sum()) == 16
    with torch.no_grad():
        pmod, dense = (models[role](**inputs).logits for role in ("pmod", "dense"))
    assert not torch.allclose(pmod, dense)


def test_dense_checkpoint_becomes_p_mod_with_zero_routers(tmp_path):
    save_tiny(tmp_path)
    models = load_models(find_subject(str(tmp_path)), torch.device("cpu"), "float32")
    routers = [p for name, p in models["pmod"].named_parameters() if ".router." in name]
    assert routers
    assert all(not p.any() for p in routers)


def test_order_repeats_and_random_weights(tmp_path):
    subject = find_subject("llava-1.5-7b")
    small = tmp_path / "config.json"
    save_tiny(tmp_path / "model")
    small.write_bytes((tmp_path / "model" / "config.json").read_bytes())
    said = []
    result = profile_checkpoint(
        small, latency=True, repeats=3, new_tokens=2, counter="formula", dtype="float32", progress=said.append
    )
    assert result["latency"]["random_weights"]
    models = result["latency"]["models"]
    assert all(len(timing["runs"]) == 3 for timing in models["dense"]["seconds"].values())
    assert models["pmod"]["kept_tokens_bound"] is not None
    assert models["dense"]["kept_tokens_bound"] is None
    assert "measuring: run 3 of 3" in said
    assert subject.main.weights is None


def test_first_seen_lengths_operators_and_a_static_cache(tmp_path):
    save_tiny(tmp_path)
    result = profile_checkpoint(
        tmp_path, latency=True, repeats=2, new_tokens=3, counter="formula", dtype="float32", cache="static"
    )
    models, ratios = result["latency"]["models"], result["ratios"]
    assert result["latency"]["cache"] == "static"
    for measured in models.values():
        assert len(measured["seconds"]["first_prefill"]["runs"]) == 2
        assert measured["operators"]["prefill"] > measured["operators"]["decode_step"] > 0
        assert measured["synchronisations"] is None
        assert measured["device_busy_seconds"] is None
        assert measured["kernels"] == []
        assert measured["without_cudnn"] is False
    assert ratios["decode_step_operators"] <= 1
    assert ratios["prefill_operators"] > 1  # PyTorch's path; with the fused kernels below 1
    assert {"first_prefill_seconds", "decode_seconds"} <= set(ratios)


def test_one_new_token_needs_no_decode(tmp_path):
    save_tiny(tmp_path)
    result = profile_checkpoint(
        tmp_path, "none", latency=True, repeats=1, new_tokens=1, counter="formula", dtype="float32"
    )
    measured = result["latency"]["models"]["dense"]
    assert set(measured["seconds"]) == {"first_prefill", "prefill", "end_to_end"}
    assert measured["decode_tokens_per_second"] is None


def test_too_big_for_this_machine(monkeypatch):
    import pmod_cli.profiling.placement as placement

    monkeypatch.setattr(placement, "_free_memory", lambda: 10**9)
    subject = find_subject("llava-1.5-7b")
    works = {role: ProfileOptions().workload(v.geometry) for role, v in subject.variants.items()}
    with pytest.raises(PmodError, match=r"14\.1\d\d GB in bfloat16, 13\.1\d\d GB more than are free"):
        measure(subject, works)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("quantum", "no device quantum here"),
        ("cuda:99", "no device cuda:99"),
        ("meta", "no device meta here"),
    ],
)
def test_bad_devices(tmp_path, device, message):
    save_tiny(tmp_path)
    with pytest.raises(PmodError, match=message):
        profile_checkpoint(tmp_path, latency=True, device=device, counter="formula")
