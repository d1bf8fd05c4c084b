"""``pmod visualize``: files, JSON, answers, and one line for every mistake."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from pmod_cli.cli import app, main
from pmod_cli.demo.job import BASELINE
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.prompts import Prompt
from tests.common import visual_models


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visualize")
    visual_models.save(visual_models.make("llava"), folder / "model")
    visual_models.noise(120, 80).save(folder / "picture.png")
    return folder


def run(capsys, *words):
    with pytest.raises(SystemExit) as exit_info:
        main(["visualize", *map(str, words)])
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def test_all_files_and_json(place, capsys):
    picture, model = place / "picture.png", place / "model"
    names = {"sheet": "sheet.png", "gif": "steps.gif", "html": "page.html"}
    files = {kind: place / name for kind, name in names.items()}
    words = [model, "--image", picture, "--prompt", "What colour?", "--layers", "7,3", "--max-new-tokens", 4]
    outputs = ["-o", files["sheet"], "--gif", files["gif"], "--html", files["html"]]
    code, out, _ = run(capsys, *words, *outputs, "--json")
    assert code in (0, None)
    document = json.loads(out)
    assert (document["schema_version"], document["command"]) == (1, "visualize")
    result = document["result"]
    assert result["files"] == {kind: str(path) for kind, path in files.items()}
    assert [len(layer["kept"]) for layer in result["layers"]] == [100, 100, 80, 60, 40, 20, 15, 15]
    assert result["views"] == [{"name": "picture", "first": 0, "rows": 10, "columns": 10}]
    sheet = Image.open(files["sheet"])
    assert sheet.text["Software"] == "pmod visualize"
    assert "What colour?" in sheet.text["Title"]
    # Both answers are what `generate` says: the baseline's are the same weights without routers.
    question = Prompt("What colour?", (Image.open(picture).convert("RGB"),))
    loaded = VisionLanguageModel.load(model)
    [answer] = loaded.generate([question], max_new_tokens=4)
    assert result["answer"] == answer.text
    from pmod_cli.visualize.trace import dense_twin

    twin = dense_twin(loaded)
    assert not any("router" in name for name, _ in twin.model.named_parameters())
    theirs = twin.model.model.language_model.layers[5].mlp.up_proj.weight
    assert theirs.data_ptr() == loaded.model.model.language_model.layers[5].mlp.up_proj.weight.data_ptr()
    [dense] = twin.generate([question], max_new_tokens=4)
    assert result["baseline"]["answer"] == dense.text
    assert dense.text != answer.text

    code, _, err = run(capsys, *words, *outputs)
    assert code == 2
    assert "exists (--force replaces it)" in err
    code, out, _ = run(capsys, *words, "--html", files["html"], "--force", "--baseline", BASELINE)
    assert code in (0, None)
    page = files["html"].read_text(encoding="utf-8")
    assert BASELINE.name in page
    assert str(BASELINE) not in page
    assert out.splitlines()[-1] == str(files["html"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "nothing to draw"),
        (["MODEL", "-o", "new.bmp"], "name a .png or .pdf or .svg file"),
        (["MODEL", "--gif", "no/such/steps.gif"], "no folder"),
        (["MODEL", "-o", "new.png", "--layers", "8,x"], "give layer numbers separated by commas"),
        (["MODEL", "-o", "new.png", "--layers", "8"], "there is no layer 8 (the model has 0 to 7)"),
        (["nowhere/at/all", "-o", "new.png"], "no checkpoint folder"),
        ([str(BASELINE), "-o", "new.png"], "the model is dense"),
        (["MODEL", "-o", "new.png", "--image", "no.png"], "no image file no.png"),
        (["MODEL", "-o", "new.png", "--baseline", "nowhere/at/all"], "no checkpoint folder"),
    ],
)
def test_mistakes_are_one_line(place, capsys, monkeypatch, words, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # told before weights are read
    words = [str(place / "model") if word == "MODEL" else word for word in words]
    if "--image" not in words:
        words += ["--image", "picture.png"]
    code, out, err = run(capsys, *words, "--prompt", "What?")
    assert code == 2
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (place / "new.png").exists()


def test_without_matplotlib(place, capsys, monkeypatch):
    """The page needs none; a sheet says which extra brings it, before a model is loaded."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [place / "model", "--image", place / "picture.png", "--prompt", "What?", "--max-new-tokens", 2]
    code, _, err = run(capsys, *words, "-o", place / "none.png")
    assert code == 2
    assert err == "error: matplotlib is not installed (pip install 'pmod-cli[plot]')\n"
    code, _, _ = run(capsys, *words, "--html", place / "alone.html")
    assert code in (0, None)
    assert (place / "alone.html").exists()
    assert app is not None
