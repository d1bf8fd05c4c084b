"""Hub ids and pushing, against a stand-in server that huggingface_hub really talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.demo.job import BASELINE
from tests.common.checkpoints import contents, make_checkpoint
from tests.common.hub_server import COMMIT, serve

ROOT = Path(__file__).parents[2]
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def hub(tmp_path):
    source = make_checkpoint(tmp_path / "repo", shards=2)
    (source / "README.md").write_text("---\nlicense: llama2\n---\n")
    (source / "original").mkdir()  # a second copy of the weights in another format, as some repositories have
    (source / "original" / "consolidated.safetensors").write_bytes(b"0" * 1000)
    pickled = make_checkpoint(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with serve({"some/llava": source, "some/pickled": pickled}) as server:
        yield server


def python(server, tmp_path, *words, **environment):
    """Run Python with the hub and its cache where the test wants them."""
    env = {**os.environ, **server.environment, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    env.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env={**env, **environment},
        cwd=tmp_path,
        timeout=120,
    )


def pmod(server, tmp_path, *words, **environment):
    return python(server, tmp_path, "-m", "pmod_cli", *words, **environment)


def test_from_the_hub_and_back(hub, tmp_path):
    done = pmod(hub, tmp_path, "convert", "some/llava", "pmod", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["methods"] == {"hard link": 2, "written": 1}
    assert not any(name.startswith("original/") for name in hub.sent)
    config = json.loads((tmp_path / "pmod" / "config.json").read_text())
    assert (config["pmod"]["source"], config["pmod"]["revision"]) == ("some/llava", COMMIT)
    assert "base_model: some/llava\nlicense: llama2\n---" in (tmp_path / "pmod" / "README.md").read_text()
    cached = list((tmp_path / "hf").rglob(WEIGHTS[0]))
    assert (tmp_path / "pmod" / WEIGHTS[0]).samefile(cached[0])

    # The cache is enough the second time, without a network.
    hub.requests.clear()
    again = pmod(hub, tmp_path, "convert", "some/llava", "pmod2", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert not hub.requests

    # What was pushed can be inspected by its routers alone, and goes back to the baseline.
    hub.repos["me/pmod"] = tmp_path / "pmod"
    hub.sent.clear()
    shown = pmod(hub, tmp_path, "inspect", "me/pmod", "--json")
    assert json.loads(shown.stdout)["result"]["initial_routers"] == 6
    assert not set(hub.sent) & set(WEIGHTS)
    back = pmod(hub, tmp_path, "convert", "me/pmod", "back", "--to", "baseline")
    assert back.returncode == 0, back.stderr
    before = contents(tmp_path / "repo")
    assert contents(tmp_path / "back") == {name: before[name] for name in before if "/" not in name}


def test_a_dry_run_downloads_headers_only(hub, tmp_path):
    code = (
        "from pmod_cli.conversion.convert import bytes_needed; from pathlib import Path;"
        "from pmod_cli.conversion.plan import plan_conversion;"
        "plan = plan_conversion('some/llava', headers=True);"
        "print(len(plan.routers), plan.weight_bytes, bytes_needed(plan.checkpoint(), Path('x')))"
    )
    done = python(hub, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    routers, weights, needed = map(int, done.stdout.split())
    local = plan_conversion(BASELINE)
    assert (routers, weights) == (len(local.routers), local.weight_bytes)
    assert needed < weights
    # The client asks for the first 100 kB of each file, where the header is.
    assert all(hub.sent[name] <= 100_001 for name in WEIGHTS)


def test_push(hub, tmp_path):
    words = ["convert", BASELINE, "pmod", "--push-to-hub", "me/new", "--private"]
    refused = pmod(hub, tmp_path, *words)
    assert refused.returncode == 2
    assert refused.stderr == "error: --push-to-hub needs a login (run hf auth login, or set HF_TOKEN)\n"
    assert not (tmp_path / "pmod").exists()

    done = pmod(hub, tmp_path, *words, "--json", HF_TOKEN="hf_test")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["pushed_to"] == f"{hub.endpoint}/me/new/commit/{COMMIT}"
    assert hub.created[0]["name"] == "new"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.commits["me/new"] == contents(tmp_path / "pmod")


def test_the_hub_says_no(hub, tmp_path):
    for repo in ("some/nothing", "closed/model"):
        done = pmod(hub, tmp_path, "convert", repo, "pmod")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: no folder {repo}, and it cannot be had from the hub: ")
        assert done.stderr.count("\n") == 1
    done = pmod(hub, tmp_path, "convert", "some/pickled", "pmod")
    assert done.returncode == 2
    assert "--allow-pickle" in done.stderr
    assert "pytorch_model.bin" not in hub.sent
    done = pmod(hub, tmp_path, "convert", "some/llava", "pmod", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    done = pmod(
        hub,
        tmp_path,
        "convert",
        BASELINE,
        "pmod",
        "--push-to-hub",
        "me/x",
        HF_TOKEN="t",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.returncode == 2
    assert "pmod is complete, but could not be pushed to me/x" in done.stderr
    convert(plan_conversion(BASELINE), tmp_path / "again")
    assert set(contents(tmp_path / "pmod")) == set(contents(tmp_path / "again"))
