"""Hub ids and pushing, against a stand-in server that huggingface_hub really talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.demo.job import BASELINE
from tests.common.checkpoints import contents, make_checkpoint
from tests.common.hub_server import COMMIT, serve

ROOT = Path(__file__).parents[2]
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repos")
    source = make_checkpoint(folder / "repo", shards=2)
    (source / "README.md").write_text("---\nlicense: llama2\n---\n")
    (source / "original").mkdir()  # a second copy of the weights in another format, as some repositories have
    (source / "original" / "consolidated.safetensors").write_bytes(b"0" * 1000)
    pickled = make_checkpoint(folder / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    return {"some/llava": source, "some/pickled": pickled}


@pytest.fixture(scope="module")
def server(repos):
    with serve({}) as server:
        yield server


@pytest.fixture
def hub(server, repos):
    server.repos = dict(repos)
    for seen in (server.requests, server.sent, server.created, server.commits):
        seen.clear()
    return server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub") / "hf"


@pytest.fixture(scope="module")
def process(server, home):
    """A process that runs many commands, for each surrounding: where the hub is, is read when Python starts."""
    started = {}

    def process_in(**surrounding):
        key = tuple(sorted(surrounding.items()))
        if key not in started:
            env = {**os.environ, **server.environment, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
            env.pop("HF_TOKEN", None)
            started[key] = subprocess.Popen(
                [sys.executable, "-m", "tests.common.commands_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**env, **surrounding},
            )
        return started[key]

    yield process_in
    for each in started.values():
        each.kill()
        each.communicate()


@pytest.fixture
def pmod(hub, process, tmp_path):
    """Run a command in such a process; its exit code and streams."""

    def run(*words, token=None, **surrounding):
        child = process(**surrounding)
        asked = {"words": list(map(str, words)), "folder": str(tmp_path), "token": token}
        child.stdin.write(json.dumps(asked) + "\n")
        child.stdin.flush()
        return SimpleNamespace(**json.loads(child.stdout.readline()))

    return run


def test_from_the_hub_and_back(hub, repos, pmod, home, tmp_path):
    done = pmod("convert", "some/llava", "pmod", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["methods"] == {"hard link": 2, "written": 1}
    assert not any(name.startswith("original/") for name in hub.sent)
    config = json.loads((tmp_path / "pmod" / "config.json").read_text())
    assert (config["pmod"]["source"], config["pmod"]["revision"]) == ("some/llava", COMMIT)
    assert "base_model: some/llava\nlicense: llama2\n---" in (tmp_path / "pmod" / "README.md").read_text()
    [cached] = home.rglob(WEIGHTS[0])
    assert (tmp_path / "pmod" / WEIGHTS[0]).samefile(cached)

    # The cache is enough the second time, without a network.
    hub.requests.clear()
    again = pmod("convert", "some/llava", "pmod2", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert not hub.requests

    # What was pushed can be inspected by its routers alone, and goes back to the baseline.
    hub.repos["me/pmod"] = tmp_path / "pmod"
    hub.sent.clear()
    shown = pmod("inspect", "me/pmod", "--json")
    assert json.loads(shown.stdout)["result"]["initial_routers"] == 6
    assert not set(hub.sent) & set(WEIGHTS)
    back = pmod("convert", "me/pmod", "back", "--to", "baseline")
    assert back.returncode == 0, back.stderr
    before = contents(repos["some/llava"])
    assert contents(tmp_path / "back") == {name: before[name] for name in before if "/" not in name}


def test_a_dry_run_downloads_headers_only(hub, tmp_path):
    code = (
        "from pmod_cli.conversion.convert import bytes_needed; from pathlib import Path;"
        "from pmod_cli.conversion.plan import plan_conversion;"
        "plan = plan_conversion('some/llava', headers=True);"
        "print(len(plan.routers), plan.weight_bytes, bytes_needed(plan.checkpoint(), Path('x')))"
    )
    env = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    routers, weights, needed = map(int, done.stdout.split())
    local = plan_conversion(BASELINE)
    assert (routers, weights) == (len(local.routers), local.weight_bytes)
    assert needed < weights
    # The client asks for the first 100 kB of each file, where the header is.
    assert all(hub.sent[name] <= 100_001 for name in WEIGHTS)


def test_push(hub, pmod, tmp_path):
    words = ["convert", BASELINE, "pmod", "--push-to-hub", "me/new", "--private"]
    refused = pmod(*words)
    assert refused.returncode == 2
    assert refused.stderr == "error: --push-to-hub needs a login (run hf auth login, or set HF_TOKEN)\n"
    assert not (tmp_path / "pmod").exists()

    done = pmod(*words, "--json", token="hf_test")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["pushed_to"] == f"{hub.endpoint}/me/new/commit/{COMMIT}"
    assert hub.created[0]["name"] == "new"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.commits["me/new"] == contents(tmp_path / "pmod")


def test_the_hub_says_no(hub, pmod, tmp_path):
    for repo in ("some/nothing", "closed/model"):
        done = pmod("convert", repo, "pmod")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: no folder {repo}, and it cannot be had from the hub: ")
        assert done.stderr.count("\n") == 1
    done = pmod("convert", "some/pickled", "pmod")
    assert done.returncode == 2
    assert "--allow-pickle" in done.stderr
    assert "pytorch_model.bin" not in hub.sent
    elsewhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
    done = pmod("convert", "some/llava", "pmod", **elsewhere)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    done = pmod(
        "convert",
        BASELINE,
        "pmod",
        "--push-to-hub",
        "me/x",
        token="t",
        **elsewhere,
    )
    assert done.returncode == 2
    assert "pmod is complete, but could not be pushed to me/x" in done.stderr
    convert(plan_conversion(BASELINE), tmp_path / "again")
    assert set(contents(tmp_path / "pmod")) == set(contents(tmp_path / "again"))
