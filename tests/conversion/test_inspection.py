"""What ``pmod inspect`` and the dry run tell, against what is in the files and what ``pmod profile`` counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pmod_cli.checkpoints.shards import StoredTensor, read_header, write_shard
from pmod_cli.conversion.convert import convert, preview
from pmod_cli.conversion.inspection import inspect_checkpoint
from pmod_cli.conversion.plan import ROUTERS, plan_conversion
from pmod_cli.demo.job import BASELINE
from pmod_cli.modeling.schedule import mean_retention, shifted_cosine
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import load_recipe
from tests.common.checkpoints import HIDDEN, make_checkpoint

RATIOS = shifted_cosine(8)


@pytest.fixture
def pmod(tmp_path):
    convert(plan_conversion(BASELINE, recipe=load_recipe("demo")), tmp_path / "pmod")
    return tmp_path / "pmod"


def test_a_converted_checkpoint(pmod):
    found = inspect_checkpoint(pmod)
    assert [row["retention_ratio"] for row in found["layers"]] == RATIOS
    assert [row["kind"] for row in found["layers"]] == ["dense"] * 2 + ["mod"] * 6
    assert found["mean_retention"] == mean_retention(RATIOS)
    assert (found["initial_routers"], found["initial_share"]) == (6, 1.0)
    assert (found["router_dtype"], found["router_parameters"]) == ("BF16", 6 * (HIDDEN + 1))
    assert found["provenance"] is not None
    assert found["provenance"]["source"] == BASELINE.name
    assert found["provenance"]["recipe"]["name"] == "demo"
    assert found["training"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_trained_routers(pmod, dtype):
    rng = np.random.default_rng(0)
    names = sorted(read_header(pmod / ROUTERS))
    shapes = {name: tensor.shape for name, tensor in read_header(pmod / ROUTERS).items()}
    values = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in names}
    for name in names:
        if ".7." in name:  # as the paper's recipe leaves it
            values[name][:] = 0
    if dtype == "BF16":
        for array in values.values():
            array[:] = (array.view("<u4") & 0xFFFF0000).view("<f4")
        stored = [
            StoredTensor.from_bytes(n, "BF16", shapes[n], (a.view("<u4") >> 16).astype("<u2").tobytes())
            for n, a in values.items()
        ]
        write_shard(pmod / ROUTERS, stored)
    else:
        values = {name: array.astype({"F32": "<f4", "F16": "<f2"}[dtype]) for name, array in values.items()}
        save_file(values, pmod / ROUTERS)
    (pmod / "training.json").write_text(
        json.dumps({"model": "start", "result": {"steps": 7, "final_loss": 0.5}})
    )
    found = inspect_checkpoint(pmod)
    assert found["router_dtype"] == dtype
    assert (found["initial_routers"], found["initial_share"]) == (1, 1 / 6)
    assert found["layers"][7]["router"]["initial"]
    for layer in range(2, 7):
        prefix = f"language_model.model.layers.{layer}.router."
        weight, bias = (values[prefix + part].astype(np.float64) for part in ("weight", "bias"))
        router = found["layers"][layer]["router"]
        assert router["weight_norm"] == pytest.approx(np.sqrt((weight**2).sum()), rel=1e-12)
        assert router["weight_max"] == np.abs(weight).max()
        assert router["bias"] == bias[0]
    assert found["training"] == {"model": "start", "steps": 7, "final_loss": 0.5}


def test_routers_that_are_not_finite(pmod):
    tensors = read_header(pmod / ROUTERS)
    nan = {name: b"\xc0\x7f" * (tensor.nbytes // 2) for name, tensor in tensors.items()}
    write_shard(
        pmod / ROUTERS,
        [StoredTensor.from_bytes(n, "BF16", tensors[n].shape, data) for n, data in nan.items()],
    )
    router = inspect_checkpoint(pmod)["layers"][2]["router"]
    assert router == {"weight_norm": None, "weight_max": None, "bias": None, "initial": False}


def test_what_cannot_be_inspected(tmp_path, pmod):
    with pytest.raises(PmodError, match="is a dense llava checkpoint"):
        inspect_checkpoint(BASELINE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PmodError, match=r"has no config\.json"):
        inspect_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "pmod_llava_llama"}')
    with pytest.raises(PmodError, match="pmod convert it first"):
        inspect_checkpoint(tmp_path / "empty")
    tensors = [t for name, t in read_header(pmod / ROUTERS).items() if ".5.router.bias" not in name]
    write_shard(
        tmp_path / "less", [StoredTensor.from_bytes(t.name, t.dtype, t.shape, t.read()) for t in tensors]
    )
    index = json.loads((pmod / "model.safetensors.index.json").read_text())
    del index["weight_map"]["language_model.model.layers.5.router.bias"]
    (pmod / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "less").replace(pmod / ROUTERS)
    with pytest.raises(PmodError, match=r"lack layers\.5\.router\.bias"):
        inspect_checkpoint(pmod)
    config = json.loads((pmod / "config.json").read_text())
    config["mod"]["colour"] = "blue"
    (pmod / "config.json").write_text(json.dumps(config))
    with pytest.raises(PmodError, match=r"bad mod section.*colour"):
        inspect_checkpoint(pmod)


def test_the_dry_run_counts_what_profile_counts(tmp_path):
    from pmod_cli.profiling.options import ProfileOptions
    from pmod_cli.profiling.profile import profile
    from pmod_cli.profiling.prompt import Workload, default_image_size, image_tokens
    from pmod_cli.profiling.subject import find_subject

    source = make_checkpoint(tmp_path / "source", shards=2)
    told = preview(plan_conversion(source, recipe=load_recipe("demo")), tmp_path / "pmod")
    counted = profile(find_subject(str(source), recipe="demo"), ProfileOptions(counter="formula"))
    expected = told["expected"]
    assert expected is not None
    for role in ("dense", "pmod"):
        assert expected["prefill_flops"][role] == counted[role]["prefill"]["flops"]
        assert expected["kv_bytes"][role] == counted[role]["kv_cache"]["prefill_bytes"]
    assert expected["prefill_flops"]["ratio"] < 1
    assert [row["retention_ratio"] for row in told["layers"]] == RATIOS
    assert not (tmp_path / "pmod").exists()

    geometry = find_subject(str(source)).main.geometry
    size = default_image_size(geometry)
    work = Workload(image_tokens(geometry, size), size)
    assert expected["prompt"] == {
        "height": size[0],
        "width": size[1],
        "vision_tokens": work.vision_tokens,
        "text_tokens": work.text_tokens,
    }


def test_the_dry_run_tells_the_disk_space_that_is_taken(tmp_path):
    plan = plan_conversion(BASELINE)
    for copy in (False, True):
        told = preview(plan, tmp_path / f"pmod{copy}", copy)
        convert(plan, tmp_path / f"pmod{copy}", copy=copy)
        files = [path for path in (tmp_path / f"pmod{copy}").rglob("*") if path.is_file()]
        taken = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
        # Headers of shards are not counted before.
        assert 0 <= taken - told["disk_needed_bytes"] < 20_000 + 200 * len(plan.translation.shards[0].tensors)
        assert told["disk_free_bytes"] > 0
