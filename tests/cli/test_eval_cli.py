"""``pmod eval`` as a user runs it: tables, JSON, files, gates, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pmod_cli.cli import main
from pmod_cli.evaluation import paper
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.generation import VisionLanguageModel
from tests.common.eval_models import make_model, make_processor, save_llava, save_pmod, write_questions
from tests.common.paper_fixtures import Fixtures

DOCS = Path(__file__).parents[2] / "docs" / "json.md"


def run(*arguments, capture=None):
    """Exit code, stdout, stderr."""
    try:
        main(["eval", *map(str, arguments)])
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    return (code, *capture.readouterr()) if capture else code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two checkpoints, the paper's tasks on fixtures, a local task, and whole evaluations in ``out`` and ``dense``."""
    folder = tmp_path_factory.mktemp("eval_cli")
    save_llava(folder / "llava", seed=0)
    save_llava(folder / "other", seed=1)
    save_pmod(folder / "llava", folder / "pmod")
    fixtures = Fixtures(folder / "fixtures")
    data = write_questions(folder / "data", ["red"] * 6 + [""] * 6)
    write_task(folder / "qa", "local_qa", data, ["colour"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PMOD_CACHE", str(folder / "cache"))
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "datasets"))
        common = ["--include-path", fixtures.include, "--include-path", folder / "qa", "--max-new-tokens", 3]
        both = [folder / "pmod", "--baseline", folder / "llava", "--tasks", "paper,local_qa"]
        assert run(*both, *common, "--output", folder / "out") == 0
        assert run(folder / "llava", "--tasks", "paper,local_qa", *common, "--output", folder / "dense") == 0
        yield folder


def options(place, *more):
    return [
        "--include-path",
        place / "fixtures" / "yaml",
        "--include-path",
        place / "qa",
        "--max-new-tokens",
        3,
        *more,
    ]


def again(place, *more):
    """The arguments of the first evaluation, whose answers are all kept."""
    both = [
        place / "pmod",
        "--baseline",
        place / "llava",
        "--tasks",
        "paper,local_qa",
        "--output",
        place / "out",
    ]
    return [*both, *options(place, *more)]


def test_the_papers_two_tables_in_its_order(place, capsys):
    code, out, err = run(*again(place), capture=capsys)
    assert code == 0, err
    first, second = (out.split(f"The paper's table {number}")[1] for number in (1, 2))
    assert re.search(r"SEED +RWQA +MME +MMB +POPE +GQA +AI2D +average", first)
    assert re.search(r"DocVQA +ChartQA +TextVQA +InfoVQA +OK-VQA +MMMU +SQA +average", second)
    labels = [line.split("  ")[0].strip() for line in second.splitlines()]
    shown = [label for label in labels if label.startswith(("our", "paper", "difference"))]
    assert shown == [
        "our baseline",
        "our p-MoD",
        "difference",
        "paper: baseline",
        "paper: p-MoD",
        "paper: difference",
        "ours - paper: baseline",
        "ours - paper: p-MoD",
    ]
    assert re.search(r"paper: p-MoD +66\.5 +55\.7 +1482\.8 +65\.4 +85\.5 +62\.2 +56\.2", first)
    assert "mmbench_en_dev_static" in out
    assert "parsed by rule" in out
    assert "kept from an earlier run" in out
    assert "…" not in out  # nothing is cut off, however narrow the terminal


def test_json_is_the_results_file_and_nothing_else_is_on_stdout(place, capsys):
    code, out, _ = run(*again(place, "--json"), capture=capsys)
    document = json.loads(out)
    assert code == 0
    assert (document["schema_version"], document["command"]) == (1, "eval")
    written = json.loads((place / "out" / "results.json").read_text())
    changing = {"seconds", "started", "missed", "schema_version", "command"}
    assert {key: value for key, value in document["result"].items() if key not in changing} == {
        key: value for key, value in written.items() if key not in changing
    }
    assert [task["name"] for task in written["tasks"]] == [*paper.TASKS, "local_qa"]
    assert written["environment"].keys() >= {
        "pmod",
        "transformers",
        "torch",
        "lmms-eval",
        "seeds",
        "processes",
    }
    assert written["model"]["fingerprint"] != written["baseline"]["fingerprint"]
    assert written["model"]["preparation"]["image_backend"] == "pil"
    assert [len(table) for table in written["paper"]] == [8, 8]


def test_the_schema_is_documented(place):
    """Every key of results.json and of a sample is named in the documentation."""
    results = json.loads((place / "out" / "results.json").read_text())
    names: set[str] = set()

    def collect(value, inside=""):
        if isinstance(value, list):
            for entry in value:
                collect(entry, inside)
        # Below these, keys are names of tasks, metrics, columns and generation settings.
        elif isinstance(value, dict) and inside not in (
            "metrics",
            "failures",
            "broken_metrics",
            "values",
            "generation",
        ):
            for key, entry in value.items():
                if inside != "task_info":
                    names.add(key)
                collect(entry, key)

    collect(results)
    sample = json.loads((place / "out" / "samples" / "gqa.jsonl").read_text().splitlines()[0])
    names |= sample.keys() | sample["model"].keys()
    documented = set(re.findall(r"`([\w-]+)`", DOCS.read_text()))
    assert names - documented == set()


def test_samples_hold_both_models_answers(place):
    for path in (place / "out" / "samples").iterdir():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row.keys() == {"doc_id", "prompt", "target", "doc", "baseline", "model"}
            assert row["model"]["error"] is None
            assert isinstance(row["model"]["answer"], str)
            assert isinstance(row["baseline"]["answer"], str)
    assert len(list((place / "out" / "samples").iterdir())) == 14 + 2 + 1  # POPE has three parts
    assert not list((place / "out").rglob("*.part"))


def test_markdown(place):
    text = (place / "out" / "report.md").read_text()
    assert "| our p-MoD |" in text
    assert "## The paper's table 2" in text
    assert "transformers" in text


def test_differences_between_two_evaluations(place, capsys):
    diff = ["--diff", place / "dense", place / "out", "--include-path", place / "fixtures" / "yaml"]
    code, out, _ = run(*diff, "--json", capture=capsys)
    found = json.loads(out)["result"]
    assert code == 0
    assert found["compared"] > 60
    # Tiny random models are hardly ever right: make one of them right where the other is wrong.
    path = place / "out" / "samples" / "gqa.jsonl"
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[1]["model"] |= {"answer": "blue", "score": 1.0}
    try:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, out, _ = run(*diff, "--json", capture=capsys)
        changed = json.loads(out)["result"]
        assert changed["better"] == found["better"] + 1
        [entry] = [entry for entry in changed["changed"] if entry["task"] == "gqa" and entry["doc_id"] == 1]
        assert entry["after"] == {"answer": "blue", "score": 1.0}
        assert entry["target"] == "blue"
        [picture] = entry["pictures"]
        assert Image.open(picture).size[0] >= 8
        code, out, _ = run(*diff, capture=capsys)
        assert picture in out
        # A sample that failed is not compared, and is counted; nor is what is left of a task of other results.
        rows[1]["model"] |= {"answer": None, "score": None}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path.parent / "stale.jsonl").write_text(before)
        shutil.copy(path.parent / "stale.jsonl", place / "dense" / "samples")
        code, out, _ = run(*diff, "--json", capture=capsys)
        less = json.loads(out)["result"]
        assert less["compared"] == found["compared"] - 1
        assert less["left_out"] == found["left_out"] + 1
        assert "stale" not in less["tasks"]
    finally:
        path.write_text(before)
        for folder in ("dense", "out"):
            (place / folder / "samples" / "stale.jsonl").unlink(missing_ok=True)


def test_gates(place, capsys):
    both = [place / "pmod", "--baseline", place / "llava", "--tasks", "gqa,local_qa", *options(place)]
    code, _, err = run(*both, "--min", "gqa=101", "--min", "local_qa=0", capture=capsys)
    assert code == 1
    assert "error: gqa reached 0.00, asked for 101" in err
    code, out, err = run(*both, "--max-drop", "-1", "--json", capture=capsys)
    assert code == 1
    assert "gqa dropped by 0.00 (0.00 to 0.00), allowed -1" in err
    assert "gqa dropped by 0.00 (0.00 to 0.00), allowed -1" in json.loads(out)["result"]["missed"]
    assert run(*both, "--max-drop", "100", "--min", "gqa=0") == 0


def test_failed_samples_are_exit_code_1_with_their_number(place, capsys, monkeypatch):
    encode = VisionLanguageModel.encode

    def broken(self, prompts):
        if any("picture 4?" in prompt.text for prompt in prompts):
            raise ValueError("no such luck")
        return encode(self, prompts)

    monkeypatch.setattr(VisionLanguageModel, "encode", broken)
    arguments = [place / "other", "--tasks", "local_qa", *options(place), "--json"]
    code, out, err = run(*arguments, capture=capsys)
    assert code == 1
    assert "1 sample failed, so its task has no score (the first is model, local_qa, 4:" in err
    assert json.loads(out)["result"]["tasks"][0]["model"]["value"] is None


def test_a_user_without_memory_of_tasks_is_helped(place, capsys):
    code, out, err = run(place / "llava", "--tasks", "gqaa,pope_ful", "--offline", capture=capsys)
    assert code == 2
    assert out == ""
    assert "gqa or" in err
    assert "pope_full or" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{llava}"], "--tasks is missing"),
        (["--tasks", "local_qa"], "no MODEL"),
        (["{llava}/none", "--tasks", "local_qa"], "no checkpoint folder"),
        (["{llava}", "--tasks", "local_qa", "--baseline", "{here}"], "no config.json"),
        (["{llava}", "--tasks", "local_qa", "--batch-size", "many"], "--batch-size many"),
        (["{llava}", "--tasks", "local_qa", "--limit", "-3"], "--limit -3"),
        (["{llava}", "--tasks", "local_qa", "--device", "toaster"], "no device toaster"),
        (["{llava}", "--tasks", "local_qa", "--device", "cuda:99"], "no device cuda:99"),
        (["{llava}", "--tasks", "local_qa", "--dtype", "float8"], "no dtype float8"),
        (["{llava}", "--tasks", "local_qa", "--max-drop", "1"], "--max-drop compares"),
        (["{llava}", "--tasks", "local_qa", "--min", "local_qa=much"], "expected task=score"),
        (["{llava}", "--tasks", "local_qa", "--min", "local_qa=nan"], "expected task=score"),
        (["{llava}", "--tasks", "local_qa", "--baseline", "{llava}", "--max-drop", "nan"], "--max-drop nan"),
        (["{llava}", "--tasks", "local_qa", "--min", "local=1"], "did you mean local_qa?"),
        (["{llava}", "--tasks", "local_qa", "--include-path", "{here}/nowhere"], "no such folder"),
        (["{llava}", "--tasks", "local_qa", "--output", "/proc/nowhere"], "check the path"),
        (["{other}", "--tasks", "local_qa", "--output", "{here}/dense"], "results of another model"),
        (["--diff", "{here}/out", "{here}/qa"], "holds no evaluation"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(place, arguments, message, capsys):
    names = {"llava": place / "llava", "other": place / "other", "here": place}
    arguments = [argument.format(**names) for argument in arguments]
    code, out, err = run(*arguments, "--include-path", place / "qa", capture=capsys)
    assert code == 2
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err


def test_a_corrupt_checkpoint_is_one_line(place, tmp_path, capsys):
    copy = shutil.copytree(place / "llava", tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = run(copy, "--tasks", "local_qa", *options(place), capture=capsys)
    assert code == 2
    assert "is truncated or corrupt" in err.splitlines()[-1]
    (copy / "config.json").write_text("{")
    assert run(copy, "--tasks", "local_qa", *options(place)) == 2


def test_what_nobody_foresaw_is_one_line_too(place, tmp_path, monkeypatch, capsys):
    def burst(self, *arguments):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("pmod_cli.evaluation.evaluate.Evaluation.run", burst)
    (tmp_path / "out").mkdir()
    arguments = [place / "llava", "--tasks", "local_qa", *options(place), "--output", tmp_path / "out"]
    code, _, err = run(*arguments, capture=capsys)
    assert code == 2
    assert "broke off: ZeroDivisionError: of all things" in err
    assert "Traceback" not in err
    assert "answers so far are kept" in err
    assert "in burst" in (tmp_path / "out" / "error.log").read_text()
    monkeypatch.setattr("pmod_cli.evaluation.command.evaluate", burst)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(*arguments[:-1], tmp_path / "never", capture=capsys)[0] == 2


def test_ctrl_c_keeps_what_was_answered(place, tmp_path, monkeypatch, capsys):
    generate, calls = VisionLanguageModel.generate, []

    def interrupted(self, prompts, **settings):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, **settings)

    arguments = [place / "llava", "--tasks", "local_qa", *options(place), "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(VisionLanguageModel, "generate", interrupted)
        assert run(*arguments, "--batch-size", 4) == 130
    code, out, _ = run(*arguments, "--json", capture=capsys)
    answers = json.loads(out[out.index("{") :])["result"]["model"]["answers"]
    assert (code, answers["recalled"], answers["generated"]) == (0, 4, 8)


def test_prepare_says_how_much_there_is(place, capsys):
    code, out, _ = run("--prepare", "--tasks", "pope_full,local_qa", *options(place), capture=capsys)
    assert code == 0
    assert out.splitlines() == [
        "pope_adv: 4 documents",
        "pope_pop: 4 documents",
        "pope_random: 4 documents",
        "local_qa: 12 documents",
    ]


def test_models_that_do_not_run_alike_are_named(place, tmp_path, capsys):
    """A baseline whose processor pads pictures beside a model whose processor crops them."""
    from pmod_cli.training.model import apply_aspect

    processor = make_processor()
    padding = apply_aspect(make_model(processor), processor, "pad")
    shutil.copytree(place / "llava", tmp_path / "padded")
    padding.save_pretrained(tmp_path / "padded")
    arguments = [place / "pmod", "--baseline", tmp_path / "padded", "--tasks", "local_qa", *options(place)]
    code, out, _ = run(*arguments, capture=capsys)
    assert code == 0
    assert "do not run alike" in out
    assert "cropped to a square and padded to a square" in out


def test_offline_reaches_what_is_imported_later(place):
    assert run(place / "llava", "--tasks", "local_qa", *options(place), "--offline") == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"
