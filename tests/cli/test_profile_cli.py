"""``pmod profile`` as a user runs it: output, JSON, exit codes, one-line errors."""

import json
import subprocess
import sys

import pytest

from pmod_cli.cli import main

TINY = """
{"model_type": "llava", "image_token_index": 60,
 "text_config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64},
 "vision_config": {"model_type": "clip_vision_model", "hidden_size": 12, "intermediate_size": 20,
                   "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}}
"""


def run(capsys, *argv):
    """Exit code, stdout, stderr."""
    try:
        main(["profile", *map(str, argv)])
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    out, err = capsys.readouterr()
    return code, out, err


def test_table(capsys):
    code, out, _ = run(capsys, "llava-1.5-7b", "--counter", "formula")
    assert code == 0
    assert "MACs / FLOPs" in out
    assert "53.7%" in out
    assert "56.3%" in out


def test_json(capsys):
    code, out, _ = run(capsys, "llava-next-7b", "--counter", "formula", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["schema_version"], document["command"]) == (1, "profile")
    assert document["result"]["dense"]["prefill"]["macs"] == 22_855_182_775_296


def test_recipe_in_the_papers_convention(capsys):
    code, out, _ = run(capsys, "--recipe", "llava-1.5-7b", "--convention", "paper")
    assert code == 0
    assert "- / 8.38 T" in out
    assert "- / 4.92 T" in out


def test_markdown(capsys):
    code, out, _ = run(capsys, "llava-1.5-7b", "--counter", "formula", "--markdown")
    assert code == 0
    assert out.startswith("**llava-1.5-7b")


def test_gate_prints_the_result_and_exits_1(capsys):
    argv = ("llava-1.5-7b", "--counter", "formula", "--json", "--max-flops-ratio", "0.5")
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert json.loads(out)["result"]["ratios"]["prefill_flops"] > 0.5
    assert "above 0.5" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["llava-1.5-7"], "did you mean llava-1.5-7b"),
        (["llava-1.5-7b", "--image-size", "big"], "not WIDTHxHEIGHT"),
        (["llava-1.5-7b", "--max-prefill-ratio", "0.5", "--counter", "formula"], "needs --latency"),
        (["llava-1.5-7b", "--max-flops-ratio", "nan", "--counter", "formula"], "limit is no number"),
        (["llava-1.5-7b", "--set", "mod.flor=0.1"], "did you mean mod.floor"),
        (["llava-1.5-7b", "--sweep", "batch", "--max-kv-ratio", "0.5"], "single profile"),
        (["llava-1.5-7b", "--schedules", "--plot", "x.png"], "--plot goes with"),
        (["llava-1.5-7b", "--image", "no-such.png"], "check the path"),
        ([], "nothing to profile"),
    ],
)
def test_errors_are_one_line_and_exit_2(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in err


def test_image_gives_its_size(capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (300, 900)).save(tmp_path / "tall.png")
    common = ("llava-next-7b", "--counter", "formula", "--json")
    _, by_file, _ = run(capsys, *common, "--image", tmp_path / "tall.png")
    _, by_size, _ = run(capsys, *common, "--image-size", "300x900")
    assert json.loads(by_file) == json.loads(by_size)
    assert json.loads(by_file)["result"]["workload"]["image_size"] == [300, 900]
    (tmp_path / "not.png").write_text("text", encoding="utf-8")
    code, _, err = run(capsys, *common, "--image", tmp_path / "not.png")
    assert code == 2
    assert "cannot read image" in err


def test_sweep_schedules_and_compare(capsys, tmp_path):
    code, out, _ = run(capsys, "llava-1.5-7b", "--sweep", "batch", "--json")
    assert code == 0
    assert [row["batch"] for row in json.loads(out)["result"]["rows"]] == [1, 2, 4, 8, 16]
    code, out, _ = run(capsys, "llava-1.5-7b", "--schedules")
    assert code == 0
    assert "interleaved" in out
    for name, batch in (("a.json", 1), ("b.json", 4)):
        _, out, _ = run(capsys, "llava-1.5-7b", "--counter", "formula", "--batch", batch, "--json")
        (tmp_path / name).write_text(out, encoding="utf-8")
    code, out, _ = run(capsys, "--compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert code == 0
    assert any(change["key"] == "workload.batch" for change in json.loads(out)["result"]["changes"])
    code, out, _ = run(capsys, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0
    assert "400.0%" in out


def test_plot_is_never_overwritten_unasked(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    picture.write_text("mine", encoding="utf-8")
    common = ("llava-1.5-7b", "--counter", "formula", "--plot", picture)
    code, _, err = run(capsys, *common)
    assert code == 2
    assert "--force" in err
    assert picture.read_text(encoding="utf-8") == "mine"
    code, _, err = run(capsys, *common, "--force")
    assert (code, picture.read_text(encoding="utf-8")) == (2, "mine")
    assert "not written by pmod" in err
    picture.unlink()
    assert run(capsys, *common)[0] == 0
    assert run(capsys, *common)[0] == 2
    assert run(capsys, *common, "--force")[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_help_is_light_and_ends_in_examples():
    code = """
import sys
from pmod_cli.cli import main
try:
    main(["profile", "--help"])
except SystemExit:
    pass
assert not {"torch", "transformers", "fvcore", "matplotlib"} & set(sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "pmod profile llava-1.5-7b" in shown


def test_7b_is_counted_by_fvcore_in_little_memory():
    """By a process that a small one starts: one that is forked off this large one counts this one's memory as its own.

    A script counts, and tells on stderr its peak memory before and after.
    """
    pytest.importorskip("fvcore")
    count = (
        "import resource, sys, atexit, torch, fvcore.nn, transformers.models.llava.modeling_llava\n"
        "from pmod_cli.cli import main\n"
        "def peak(): print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "peak()\n"
        "atexit.register(peak)\n"
        "main(['profile', 'llava-1.5-7b', '--counter', 'fvcore', '--json'])\n"
    )
    start = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
    words = [sys.executable, "-c", start, "-c", count]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    libraries, peak = (1024 * int(line) for line in done.stderr.splitlines() if line.isdigit())
    assert 0 < peak - libraries < 0.5e9  # the weights would take 14e9
    result = json.loads(done.stdout)["result"]
    assert result["checks"] == {"formula": True}
    assert result["dense"]["prefill"]["macs"] == 4_330_183_681_024


def test_measuring(capsys, tmp_path):
    # Limits that no machine misses, and none meets: the test is of the gate, not of the time.
    (tmp_path / "config.json").write_text(TINY, encoding="utf-8")
    common = (
        tmp_path,
        "--latency",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--new-tokens",
        "3",
        "--counter",
        "formula",
    )
    code, out, _ = run(capsys, *common, "--max-prefill-ratio", "1e9")
    assert code == 0
    assert "generate, end to end" in out
    code, _, err = run(capsys, *common, "--max-prefill-ratio", "0")
    assert code == 1
    assert "prefill time: " in err
