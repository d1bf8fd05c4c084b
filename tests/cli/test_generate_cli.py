"""``pmod generate`` from the command line."""

from __future__ import annotations

import json
import random

import pytest

from pmod_cli.cli import main
from pmod_cli.output.text import plain
from tests.common.eval_models import noise, save_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(save_llava(tmp_path_factory.mktemp("generate") / "model", seed=0))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    noise(random.Random(0), 30, 20).save(path)
    return str(path)


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *arguments])
    return stopped.value.code


def test_the_answer_depends_on_the_picture(llava, picture, capsys):
    question = ["--prompt", "What is it?", "--max-new-tokens", "6", "--json"]
    assert run(llava, "--image", picture, *question) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["command"] == "generate"
    assert seen["result"]["new_tokens"] == 6
    assert run(llava, *question) == 0
    unseen = json.loads(capsys.readouterr().out)
    assert seen["result"]["answer"] != unseen["result"]["answer"]
    assert (
        seen["result"]["prompt_tokens"] == unseen["result"]["prompt_tokens"] + 16 + 1
    )  # the template's newline


def test_plain_output_is_the_answer_alone(llava, picture, capsys):
    assert run(llava, "--image", picture, "--prompt", "What is it?", "--max-new-tokens", "6", "--json") == 0
    answer = json.loads(capsys.readouterr().out)["result"]["answer"]
    assert run(llava, "--image", picture, "--prompt", "What is it?", "--max-new-tokens", "6") == 0
    assert capsys.readouterr().out.strip() == plain(answer).strip()


def test_errors_are_one_line_and_exit_code_2(llava, picture, tmp_path, capsys):
    (tmp_path / "text.png").write_text("not a picture")
    wrong = {
        "no image file": [llava, "--image", str(tmp_path / "none.png")],
        "is not an image": [llava, "--image", str(tmp_path / "text.png")],
        "no checkpoint folder": [str(tmp_path / "nothing")],
        "is not a checkpoint": [str(tmp_path)],
    }
    for message, arguments in wrong.items():
        assert run(*arguments, "--prompt", "x") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_a_prompt_longer_than_the_context(llava, capsys):
    assert run(llava, "--prompt", "red " * 100_000) == 2
    assert "and the model reads 4,096 (shorten it)" in capsys.readouterr().err.splitlines()[-1]
