"""The result: figures, ratios, gates, sweeps, schedules, comparison, notes and pictures."""

import json
import sys
from pathlib import Path

import pytest

from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.modeling.twin import meta_model
from pmod_cli.output.errors import GateError, MissingExtraError, PmodError
from pmod_cli.output.units import size
from pmod_cli.profiling.command import check_gates, compare_files
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.profile import phase_dict, profile
from pmod_cli.profiling.render import macs, notes, profile_table
from pmod_cli.profiling.subject import find_subject
from pmod_cli.profiling.sweep import sweep
from tests.common.profiling_models import TINY_MOD, profile_checkpoint, save_tiny, tiny_raw


def seven_b(**changes):
    return profile(find_subject("llava-1.5-7b"), ProfileOptions(**{"counter": "formula", **changes}))


def test_retention_of_vision_and_of_all_tokens_differ():
    found = seven_b()["pmod"]["retention"]
    assert found["vision"] == pytest.approx(0.5369, abs=5e-5)
    assert found["all"] == pytest.approx(0.5634, abs=5e-5)
    assert seven_b()["ratios"]["kv_prefill"] == pytest.approx(found["all"])


def test_vision_retention_is_unknown_where_text_competes():
    subject = find_subject("llava-1.5-7b", overrides=["mod.target_tokens=all"])
    found = profile(subject, ProfileOptions(counter="formula"))["pmod"]["retention"]
    assert found["vision"] is None


def test_fvcore_is_checked_against_the_formula(tmp_path):
    pytest.importorskip("fvcore")
    save_tiny(tmp_path, mod=TINY_MOD)
    result = profile_checkpoint(tmp_path, counter="fvcore")
    assert result["checks"] == {"formula": True}
    assert result["counted_by"] == "fvcore"


def test_layers_of_a_kind_are_counted_once_and_as_in_the_whole_model(tmp_path):
    pytest.importorskip("fvcore")
    from pmod_cli.profiling import fvcore_counter

    mod = MoDConfig([None, 0.5, None, 0.5])
    save_tiny(tmp_path, mod=mod)
    subject = find_subject(str(tmp_path))
    short, places = fvcore_counter.distinct_layers(subject.pmod)
    assert (short.mod.retention_ratios, places) == ([None, 0.5], [0, 1, 0, 1])
    assert short.config.text_config.num_hidden_layers == 2
    options = ProfileOptions(counter="fvcore")
    counted = profile(subject, options)["pmod"]
    whole = meta_model(subject.pmod.config, "bfloat16")
    prefill, step = map(phase_dict, fvcore_counter.count(whole, options.workload(subject.pmod.geometry)))
    assert (counted["prefill"], counted["decode_step"]) == (prefill, step)


def test_layers_differ_in_kind_if_their_attention_does(tmp_path):
    from pmod_cli.profiling import fvcore_counter

    text = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(tiny_raw(text=text)), encoding="utf-8")
    subject = find_subject(str(tmp_path), baseline="none")
    short, places = fvcore_counter.distinct_layers(subject.dense)
    assert short.config.text_config.layer_types == ["full_attention", "sliding_attention"]
    assert places == [0, 0, 1, 1]


def test_without_fvcore(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore", None)
    assert seven_b(counter="auto")["counted_by"] == "formula"
    with pytest.raises(MissingExtraError, match=r"pmod-cli\[profile\]"):
        seven_b(counter="fvcore")


def test_paper_convention_shows_what_was_published():
    result = profile(find_subject(None, recipe="llava-1.5-7b"), ProfileOptions(convention="paper"))
    published = result["published"]
    assert (published["dense_tflops"], published["pmod_tflops"]) == (8.38, 4.92)
    assert result["workload"]["text_tokens"] == 30
    assert any("published" in row[0] for row in profile_table(result).rows)
    assert profile(find_subject("llava-1.5-13b"), ProfileOptions(convention="paper"))["published"] is None
    with pytest.raises(PmodError, match="by formula only"):
        seven_b(convention="paper", counter="fvcore")


def test_json_is_complete_and_plain():
    document = json.loads(json.dumps(seven_b(batch=2), allow_nan=False))
    assert document["pmod"]["prefill"]["flops"] == 2 * document["pmod"]["prefill"]["macs"]
    parts = document["dense"]["prefill"]["parts"]
    assert sum(part["macs"] for part in parts.values()) == document["dense"]["prefill"]["macs"]
    layers = document["pmod"]["prefill"]["layers"]
    decoder = ("attention_projections", "attention_scores", "mlp", "router")
    assert sum(layer["macs"] for layer in layers) == sum(
        document["pmod"]["prefill"]["parts"][part]["macs"] for part in decoder
    )
    assert document["ratios"]["prefill_flops"] == pytest.approx(0.588, abs=1e-3)


def test_gates():
    result = seven_b()["ratios"]
    check_gates(result, {"max_flops_ratio": 0.59, "max_kv_ratio": 0.57})
    with pytest.raises(GateError, match=r"prefill FLOPs: 0\.5880 of dense, above 0\.5; KV cache"):
        check_gates(result, {"max_flops_ratio": 0.5, "max_kv_ratio": 0.5})
    with pytest.raises(PmodError, match="needs --latency"):
        check_gates(result, {"max_prefill_ratio": 0.9})
    alone = profile(find_subject("llava-1.5-7b", baseline="none"), ProfileOptions(counter="formula"))
    with pytest.raises(PmodError, match="needs a p-MoD model and its dense baseline"):
        check_gates(alone["ratios"], {"max_flops_ratio": 0.9})


@pytest.mark.parametrize(
    "bad", [{"convention": "x"}, {"counter": "x"}, {"dtype": "int8"}, {"batch": 0}, {"text_tokens": 10**9}]
)
def test_bad_settings(bad):
    with pytest.raises(PmodError):
        ProfileOptions(**bad)


def test_more_than_tensors_hold_is_for_the_formula():
    pytest.importorskip("fvcore")
    from pmod_cli.profiling import fvcore_counter

    most = {"batch": 10**6, "text_tokens": 10**6}
    assert seven_b(**most)["counted_by"] == "formula"
    dense = find_subject("llava-1.5-7b").dense
    with pytest.raises(PmodError, match="--counter formula"):
        fvcore_counter.trace(dense, ProfileOptions(**most).workload(dense.geometry))


def test_sweep_of_ratios_rises():
    rows = sweep(find_subject("llava-1.5-7b"), ProfileOptions(), "ratio")
    flops = [row["prefill_flops"] for row in rows]
    assert flops == sorted(flops)
    assert rows[-1]["ratio"] == 1.0
    assert rows[-1]["kv_prefill"] == 1.0


def test_sweep_of_batch_saves_more_decode_traffic():
    rows = sweep(find_subject("llava-next-7b"), ProfileOptions(), "batch")
    traffic = [row["decode_step_traffic"] for row in rows]
    assert traffic == sorted(traffic, reverse=True)
    assert len({row["prefill_flops"] for row in rows}) == 1


def test_sweep_of_tokens_measured(tmp_path):
    save_tiny(tmp_path, mod=TINY_MOD, text={"max_position_embeddings": 2048})
    rows = sweep(
        find_subject(str(tmp_path)),
        ProfileOptions(dtype="float32", new_tokens=2, latency=True, repeats=1),
        "tokens",
    )
    kv = [row["kv_prefill"] for row in rows]
    assert kv == sorted(kv)
    assert all(row["prefill_seconds"] > 0 for row in rows)


def test_sweep_needs_two_models(tmp_path):
    alone = find_subject("llava-1.5-7b", baseline="none")
    for knob in ("ratio", "tokens"):
        with pytest.raises(PmodError, match="dense baseline"):
            sweep(alone, ProfileOptions(), knob)
    with pytest.raises(PmodError, match="dense baseline"):
        sweep(alone, ProfileOptions(), "schedules")


def test_schedules_at_equal_mean():
    rows = sweep(find_subject("llava-1.5-7b"), ProfileOptions(), "schedules")
    assert [row["schedule"] for row in rows] == [
        "this model",
        "shifted_cosine",
        "shifted_linear",
        "constant",
        "interleaved",
    ]
    assert rows[1]["setting"] == {"shift": pytest.approx(0.5, abs=1e-4)}
    assert (
        rows[0]["pmod"]["prefill_macs"] == rows[1]["pmod"]["prefill_macs"] < rows[0]["dense"]["prefill_macs"]
    )
    assert all(row["mean_retention"] == pytest.approx(rows[0]["mean_retention"], abs=0.01) for row in rows)


def test_compare_names_what_changed(tmp_path):
    for name, batch in (("a", 1), ("b", 2)):
        document = {"schema_version": 1, "command": "profile", "result": seven_b(batch=batch)}
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
    changes = {c["key"]: c for c in compare_files(tmp_path / "a", tmp_path / "b")["changes"]}
    assert changes["workload.batch"]["after"] == 2
    assert changes["pmod.prefill.macs"]["ratio"] == 2
    assert "pmod.parameters.total" not in changes
    assert compare_files(tmp_path / "a", tmp_path / "a")["changes"] == []
    for wrong in ("{}", '{"command": "profile"}', '{"command": "profile", "result": [1]}'):
        (tmp_path / "c").write_text(wrong, encoding="utf-8")
        with pytest.raises(PmodError, match="not the output"):
            compare_files(tmp_path / "a", tmp_path / "c")
    with pytest.raises(PmodError, match="cannot read"):
        compare_files(tmp_path / "a", tmp_path / "none")


def test_units():
    assert macs(4_330_183_681_024) == "4.330 / 8.660 T"
    assert macs(739_271_245_824) == "0.7393 / 1.479 T"
    assert macs(600) == "0.6000 / 1.200 k"
    assert size(180_486_144) == "180.486 MB"
    assert size(12) == "12 B"


def test_markdown_and_notes():
    result = seven_b()
    assert "| all | 4.330 / 8.660 T | 2.546 / 5.092 T | 58.8% |" in profile_table(result).to_markdown()
    assert "two FLOPs" in " ".join(notes(result))


def test_notes_say_where_a_saving_does_not_show(tmp_path):
    save_tiny(tmp_path, mod=TINY_MOD)
    result = profile_checkpoint(
        tmp_path, latency=True, repeats=1, new_tokens=3, counter="formula", dtype="float32"
    )
    for bound, told in ((0.5, "over the bound"), (2, "below its own bound")):
        result["latency"]["bound_overhead"] = 1 / bound - 1
        text = " ".join(notes(result))
        assert "KV cache is" in text
        assert told in text


def test_a_disagreement_is_told():
    result = seven_b() | {"counted_by": "fvcore", "checks": {"formula": False}}
    assert any(note.startswith("WARNING") for note in notes(result))


@pytest.mark.parametrize("latency", [False, True])
def test_plot(tmp_path, latency):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from pmod_cli.profiling.plots import plot_profile

    save_tiny(tmp_path / "model", mod=TINY_MOD)
    options = {"latency": True, "repeats": 2, "new_tokens": 2, "dtype": "float32"} if latency else {}
    plot_profile(profile_checkpoint(tmp_path / "model", counter="formula", **options), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_bad_targets_of_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from pmod_cli.profiling.plots import plot_profile

    with pytest.raises(PmodError, match="cannot write a picture"):
        plot_profile(seven_b(), tmp_path / "curve.txt")
    with pytest.raises(PmodError, match="no folder"):
        plot_profile(seven_b(), tmp_path / "none" / "curve.png")


def test_shipped_geometries_are_all_profiled():
    from pmod_cli.profiling.geometry import shipped_geometries

    for name in shipped_geometries():
        ratio = profile(find_subject(name), ProfileOptions(counter="formula"))["ratios"]["prefill_flops"]
        # A small model's vision tower is a large share of it and not routed.
        assert 0.5 < ratio < (0.6 if name.startswith("llava-") and "0.5b" not in name else 0.97)


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "qwen2", "use_sliding_window": False},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
        {"model_type": "mistral", "sliding_window": None},
    ],
)
def test_unusual_decoders(tmp_path, text):
    pytest.importorskip("fvcore")
    model = save_tiny(tmp_path, mod=TINY_MOD, text=text)
    result = profile_checkpoint(tmp_path, counter="fvcore")
    assert result["pmod"]["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert all(result["checks"].values())


def test_raw_config_is_not_touched(tmp_path):
    raw = tiny_raw()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    profile_checkpoint(path, counter="formula")
    assert json.loads(path.read_text(encoding="utf-8")) == raw


def test_the_tables_in_the_documentation_are_what_is_counted():
    text = (Path(__file__).parents[2] / "docs" / "profile.md").read_text(encoding="utf-8")
    rows = {
        "LLaVA-1.5-7B": "llava-1.5-7b",
        "LLaVA-1.5-13B": "llava-1.5-13b",
        "LLaVA-NeXT-7B": "llava-next-7b",
    }
    for title, name in rows.items():
        for convention in ("full", "paper"):
            result = profile(find_subject(name), ProfileOptions(convention=convention, counter="formula"))
            dense, pmod = (result[role]["prefill"]["flops"] / 1e12 for role in ("dense", "pmod"))
            row = f"| {title} | {convention} | {dense:.2f} | {pmod:.2f} | {pmod / dense:.1%}".replace(
                "%", " %"
            )
            assert row in text
