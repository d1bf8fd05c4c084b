"""What conversion puts on disk, and that the way back gives the baseline again, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pmod_cli.checkpoints import write
from pmod_cli.checkpoints.shards import read_header
from pmod_cli.conversion.convert import bytes_needed, convert, convert_back
from pmod_cli.conversion.formats import Options
from pmod_cli.conversion.plan import ROUTERS, plan_conversion
from pmod_cli.demo.job import BASELINE
from pmod_cli.modeling.schedule import shifted_cosine
from pmod_cli.output import files
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import parse_recipe
from tests.common.checkpoints import HIDDEN, LAYERS, contents, make_checkpoint, modern, old

MOD_LAYERS = range(2, 8)


def to_pmod(source, destination, overrides=(), options=None, **how):
    return convert(plan_conversion(source, overrides=overrides, options=options), destination, **how)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rename", [str, modern, old])
def test_there_and_back(tmp_path, rename, shards):
    source = make_checkpoint(tmp_path / "source", rename, shards)
    (source / "README.md").write_text("---\nlicense: llama2\n---\n# The baseline\n")
    before = contents(source)
    result = to_pmod(source, tmp_path / "pmod")
    assert result["methods"] == {"hard link": shards, "written": 1}
    assert contents(source) == before
    back = convert_back(tmp_path / "pmod", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    assert back["methods"] == {"hard link": shards}
    assert back["router_parameters"] == result["router_parameters"] == len(MOD_LAYERS) * (HIDDEN + 1)


@pytest.mark.parametrize("rename", [str, modern])
def test_weights_are_linked_and_routers_added(tmp_path, rename):
    source = make_checkpoint(tmp_path / "source", rename, shards=3)
    to_pmod(source, tmp_path / "pmod")
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert all((tmp_path / "pmod" / name).samefile(source / name) for name in names)

    prefix = rename("language_model.model.layers.")
    routers = read_header(tmp_path / "pmod" / ROUTERS)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in routers.items()} == {
        f"{prefix}{layer}.router.{part}": ("BF16", shape)
        for layer in MOD_LAYERS
        for part, shape in (("weight", (1, HIDDEN)), ("bias", (1,)))
    }
    assert not any(np.frombuffer(tensor.read(), np.uint8).any() for tensor in routers.values())

    index = json.loads((tmp_path / "pmod" / "model.safetensors.index.json").read_text())
    files = {name: set(read_header(tmp_path / "pmod" / name)) for name in [*names, ROUTERS]}
    assert {
        name: {key for key, file in index["weight_map"].items() if file == name} for name in files
    } == files
    sizes = [t.nbytes for name in files for t in read_header(tmp_path / "pmod" / name).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_config_is_self_describing(tmp_path):
    dense = json.loads((BASELINE / "config.json").read_text())
    to_pmod(BASELINE, tmp_path / "pmod", ["mod.floor=0.2", "mod.router_bias=false"])
    config = json.loads((tmp_path / "pmod" / "config.json").read_text())
    mod, origin = config.pop("mod"), config.pop("pmod")
    assert mod["retention_ratios"] == shifted_cosine(LAYERS, floor=0.2)
    assert mod["router_bias"] is False
    assert not any(name.endswith("bias") for name in read_header(tmp_path / "pmod" / ROUTERS))
    assert origin["source"] == BASELINE.name
    assert (origin["format"], origin["recipe"]["mod"]["floor"]) == ("huggingface", 0.2)
    assert config.pop("model_type") == "pmod_llava"
    assert config.pop("architectures") == ["PmodLlavaForConditionalGeneration"]
    assert config == {key: dense[key] for key in dense if key not in ("model_type", "architectures")}


def test_the_model_card_has_recipe_licence_and_citation(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: llama2\ntags: [x]\n---\n# The baseline\n")
    recipe = parse_recipe({"name": "mine", "family": "llava", "mod": {"floor": 0.25}})
    convert(plan_conversion(source, recipe=recipe), tmp_path / "pmod")
    card = (tmp_path / "pmod" / "README.md").read_text()
    for text in ("license: llama2", "name: mine", "floor: 0.25", "@article{zhang2024pmod", "2412.04449"):
        assert text in card


def test_copies_are_copies(tmp_path):
    source = make_checkpoint(tmp_path / "source", shards=2)
    result = to_pmod(source, tmp_path / "pmod", copy=True)
    assert result["methods"] == {"copy": 2, "written": 1}
    name = "model-00001-of-00002.safetensors"
    assert not (tmp_path / "pmod" / name).samefile(source / name)
    assert (tmp_path / "pmod" / name).read_bytes() == (source / name).read_bytes()


def test_where_links_are_refused_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    moved = []
    to_pmod(BASELINE, tmp_path / "pmod", progress=moved.append)
    copied = tmp_path / "pmod" / "model-00001-of-00001.safetensors"
    assert copied.read_bytes() == (BASELINE / "model.safetensors").read_bytes()
    assert sum(moved) >= copied.stat().st_size


def test_across_file_systems(tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        plan = plan_conversion(BASELINE)
        result = convert(plan, Path(folder) / "pmod")
        assert result["methods"] == {"copy": 1, "written": 1}
        assert bytes_needed(plan.checkpoint(), Path(folder) / "other") > plan.weight_bytes
        convert_back(Path(folder) / "pmod", Path(folder) / "back")
        assert contents(Path(folder) / "back") == contents(BASELINE)


@pytest.mark.parametrize(
    ("mount", "message"),
    [("-o size=1m", "MB more than are free"), ("-o ro", "is not writable")],
)
def test_a_small_and_a_closed_disk(tmp_path, mount, message):
    """Real ones, in a mount namespace of their own; root may write everywhere else."""
    (tmp_path / "disk").mkdir()
    command = f"mount -t tmpfs {mount} none disk && {sys.executable} -m pmod_cli convert {BASELINE} disk/pmod"
    command += "; code=$?; ls -A disk; exit $code"
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", command]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if "error:" not in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr}")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_pickled_weights_only_if_allowed(tmp_path):
    import torch
    from safetensors.torch import load_file

    source = make_checkpoint(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(PmodError, match=r"pickled.*--allow-pickle"):
        plan_conversion(source)
    result = to_pmod(source, tmp_path / "pmod", options=Options(allow_pickle=True))
    assert result["methods"] == {"written": 2}
    written = load_file(tmp_path / "pmod" / "model-00001-of-00001.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert not list((tmp_path / "pmod").glob("*.bin"))

    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    torch.save({"a": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(PmodError, match="holds more than weights"):
        plan_conversion(source, options=Options(allow_pickle=True))


def test_the_hub_cache_is_linked_through_its_symlinks(tmp_path):
    """The cache's layout: snapshots/COMMIT/NAME are links to blobs."""
    source = make_checkpoint(tmp_path / "source", shards=2)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    to_pmod(snapshot, tmp_path / "pmod")
    made = tmp_path / "pmod" / "model-00001-of-00002.safetensors"
    assert made.samefile(snapshot / made.name)
    assert not any(path.is_symlink() for path in (tmp_path / "pmod").rglob("*"))
    convert_back(tmp_path / "pmod", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(snapshot)


def test_a_trained_checkpoint_is_stripped(tmp_path):
    """``save_pretrained`` mixes routers with the other weights; the rest of such a file is written anew."""
    from pmod_cli.checkpoints.shards import StoredTensor, write_shard

    pmod = tmp_path / "pmod"
    to_pmod(make_checkpoint(tmp_path / "source", shards=2), pmod)
    first = read_header(pmod / "model-00001-of-00002.safetensors")
    routers = [
        StoredTensor.from_bytes(name, tensor.dtype, tensor.shape, b"\1" * tensor.nbytes)
        for name, tensor in read_header(pmod / ROUTERS).items()
    ]
    write_shard(tmp_path / "mixed", [*first.values(), *routers])
    for path in pmod.iterdir():
        if path.name == "baseline":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (pmod / ROUTERS).unlink()
    (pmod / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "mixed").rename(pmod / "model-00001-of-00002.safetensors")
    index = json.loads((pmod / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: file if file != ROUTERS else "model-00001-of-00002.safetensors"
        for name, file in index["weight_map"].items()
    }
    (pmod / "model.safetensors.index.json").write_text(json.dumps(index))

    result = convert_back(pmod, tmp_path / "back")
    assert result["methods"] == {"written": 1, "hard link": 1}
    assert "as it is now" in result["notes"][0]
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        ours, theirs = read_header(tmp_path / "back" / name), read_header(tmp_path / "source" / name)
        assert {key: tensor.read() for key, tensor in ours.items()} == {
            key: tensor.read() for key, tensor in theirs.items()
        }
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((BASELINE / "config.json").read_text())


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path):
    to_pmod(BASELINE, tmp_path / "pmod")
    with pytest.raises(PmodError, match=r"exists.*--force"):
        to_pmod(BASELINE, tmp_path / "pmod")
    to_pmod(BASELINE, tmp_path / "pmod", ["mod.floor=0.3"], force=True)
    (tmp_path / "pmod" / "notes").write_text("a user's")
    with pytest.raises(PmodError, match="not written by pmod, or not all"):
        to_pmod(BASELINE, tmp_path / "pmod", force=True)
    assert (tmp_path / "pmod" / "notes").read_text() == "a user's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pmod"]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(PmodError, match="not written by pmod"):
        to_pmod(BASELINE, tmp_path / "papers", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(PmodError, match="is not a folder"):
        to_pmod(BASELINE, tmp_path / "file", force=True)


def test_force_without_an_atomic_exchange(tmp_path, monkeypatch):
    """Where the system cannot swap two folders, two renames do."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    to_pmod(BASELINE, tmp_path / "pmod")
    to_pmod(BASELINE, tmp_path / "pmod", ["mod.floor=0.3"], force=True)
    config = json.loads((tmp_path / "pmod" / "config.json").read_text())
    assert config["mod"]["retention_ratios"][-1] == 0.3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pmod"]


def test_source_and_destination(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(PmodError, match="same folder"):
        to_pmod(source, tmp_path / "source", force=True)
    with pytest.raises(PmodError, match="same folder"):
        to_pmod(source, tmp_path / "alias", force=True)
    with pytest.raises(PmodError, match="inside the other"):
        to_pmod(source, source / "pmod")
    with pytest.raises(PmodError, match="inside the other"):
        to_pmod(source, tmp_path, force=True)
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    with pytest.raises(PmodError, match="is a file"):
        to_pmod(source, tmp_path / "file" / "pmod")
    assert contents(tmp_path) == before


def test_lack_of_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "free_space", lambda _: 1_000_000)
    with pytest.raises(PmodError, match=r"1\.5\d\d MB more than are free"):
        to_pmod(BASELINE, tmp_path / "pmod", copy=True)
    assert not list(tmp_path.iterdir())
    to_pmod(BASELINE, tmp_path / "pmod")  # links need no room


def test_a_full_disk_half_way(tmp_path, monkeypatch):
    def full(path, tensors, progress=None):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(write, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        to_pmod(BASELINE, tmp_path / "pmod")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"files": {"config.json": "../../secret"}}, "not a file of the checkpoint"),
        ({"files": {"config.json": "/etc/passwd"}}, "not a file of the checkpoint"),
        ({"files": {"../x": "config.json"}}, "not a file of the checkpoint"),
        ({"files": {"config.json": "none.json"}}, "lacks none.json"),
        ({"files": ["config.json"]}, "names no files"),
    ],
)
def test_a_forged_manifest(tmp_path, manifest, message):
    to_pmod(BASELINE, tmp_path / "pmod")
    (tmp_path / "pmod" / "baseline" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PmodError, match=message):
        convert_back(tmp_path / "pmod", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_dense_checkpoint_has_nothing_to_take_out(tmp_path):
    with pytest.raises(PmodError, match="dense llava checkpoint already"):
        convert_back(BASELINE, tmp_path / "back")
