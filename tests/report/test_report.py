"""What a report says is what the commands' own files say; changed answers come with their real pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pmod_cli.demo import tight
from pmod_cli.evaluation.diff import read_answers
from pmod_cli.evaluation.paper import TASKS, average
from pmod_cli.output.errors import PmodError
from pmod_cli.output.marks import TAG
from pmod_cli.output.tables import Table
from pmod_cli.published import SCORES
from pmod_cli.report import figures, write_report
from pmod_cli.report.collect import collect
from pmod_cli.report.document import Document, Section, Text, to_html, to_markdown
from pmod_cli.report.models import compare, gather, main_model, reference, short_names


class Page(HTMLParser):
    """Tables (rows of cells), pictures and text of a page, by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, dict[str, list]] = {}
        self.here: dict[str, list] = {}
        self.cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "section":
            self.here = self.sections.setdefault(
                values["id"], {"rows": [], "images": [], "text": [], "svg": []}
            )
        elif tag == "tr":
            self.here["rows"].append([])
        elif tag in ("td", "th"):
            self.cell = []
        elif tag == "img":
            self.here["images"].append(base64.b64decode(values["src"].partition(",")[2]))
        elif tag == "svg":
            self.here["svg"].append(values)

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.cell is not None:
            self.here["rows"][-1].append("".join(self.cell))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)
        elif self.here:
            self.here["text"].append(data)

    def row(self, section: str, label: str) -> list[str]:
        """The first row of a section that begins with a label."""
        return next(row for row in self.sections[section]["rows"] if row and row[0] == label)


@pytest.fixture(scope="module")
def demo_page(demo_folder):
    """The page with which the demo ends."""
    return Page((demo_folder / "report.html").read_text(encoding="utf-8"))


def step(demo_folder: Path, name: str) -> dict:
    return json.loads((demo_folder / "steps" / f"{name}.json").read_text())["result"]


def test_demo_s_page_has_every_section(demo_page):
    assert list(demo_page.sections) == [
        "summary",
        "where-the-vision-tokens-go",
        "recipe",
        "cost",
        "accuracy",
        "accuracy-against-flops",
        "training",
        "samples-that-differ",
        "environment",
    ]
    assert len(demo_page.sections["accuracy-against-flops"]["svg"]) == 1
    assert len(demo_page.sections["training"]["svg"]) == 1


def test_costs_are_the_profile_s(demo_folder, demo_page):
    profile = step(demo_folder, "profile")
    # The budgets' own come before it.
    [*_, row] = [row for row in demo_page.sections["cost"]["rows"] if row[0] == "prefill"]
    flops = [profile[role]["prefill"]["flops"] for role in ("dense", "pmod")]
    for cell, value in zip(row[1:3], flops, strict=True):
        number, unit = cell.split()
        assert float(number) * {"M": 1e6, "G": 1e9}[unit] == pytest.approx(value, rel=1e-3)
    assert row[3] == f"{100 * flops[1] / flops[0]:.1f} %"
    measured = profile["latency"]["models"]["pmod"]["seconds"]["prefill"]["median"]
    assert demo_page.row("cost", "prefill (first token)")[2] == f"{1e3 * measured:.1f} ms"
    kv = profile["ratios"]["kv_prefill"]
    summary = demo_page.sections["summary"]["text"]
    assert f"{100 * (kv - 1):+.1f} %".replace("-", "−") in summary
    assert any("p-MoD, fine-tuned against" in text for text in summary)  # the same model


def test_accuracies_are_the_evaluations(demo_folder, demo_page):
    header = demo_page.sections["accuracy"]["rows"][0]
    names = ["baseline", "dense, fine-tuned (control)", "p-MoD, before fine-tuning", "p-MoD, fine-tuned"]
    steps = dict(zip(names, ("eval-baseline", "eval-dense", "eval-pmod-start", "eval-pmod"), strict=True))
    steps |= {tight.LABELS[folder]: made for made, folder in tight.EVALUATED.items()}
    assert sorted(header[1:]) == sorted(steps)
    row = dict(zip(header, demo_page.row("accuracy", "pmod_demo"), strict=True))
    colour = dict(zip(header, demo_page.row("accuracy", "– colour"), strict=True))
    for name, made in steps.items():
        score = step(demo_folder, made)["tasks"][0]["model"]
        assert row[name] == f"{score['value']:.1f} ± {1.96 * score['stderr']:.1f}"
        assert colour[name] == f"{100 * score['metrics']['pmod_demo']['colour,none']:.1f}"
    assert demo_page.row("accuracy", "pmod_demo_shuffled").count("-") == len(steps) - 1


def test_recipe_training_and_pictures(demo_folder, demo_page):
    summary = json.loads((demo_folder / "models" / "pmod" / "training.json").read_text())
    header = next(row for row in demo_page.sections["recipe"]["rows"] if "p-MoD, fine-tuned" in row)
    rate = dict(zip(header, demo_page.row("recipe", "train.learning_rate"), strict=True))
    assert float(rate["p-MoD, fine-tuned"]) == summary["recipe"]["train"]["learning_rate"]
    row = demo_page.row("training", "p-MoD, fine-tuned")
    assert row[1] == str(summary["result"]["steps"])
    assert float(row[3]) == pytest.approx(summary["result"]["final_loss"], rel=1e-3)
    images = demo_page.sections["where-the-vision-tokens-go"]["images"]
    assert (demo_folder / "kept_patches.png").read_bytes() in images
    text = (demo_folder / "report.html").read_text(encoding="utf-8")
    assert 'href="visualize.html"' in text


def test_markdown_says_the_same(demo_folder, demo_page):
    text = (demo_folder / "report.md").read_text(encoding="utf-8")
    for section in ("cost", "accuracy"):
        for row in demo_page.sections[section]["rows"]:
            if len(row) > 1 and row[0]:
                line = "| " + " | ".join(row).replace("_", "\\_").replace("*", "\\*") + " |"
                assert line in text
    pictures = re.findall(r"\]\((report_files/[^)]+)\)", text)
    assert len(pictures) >= 4
    for name in pictures:
        with Image.open(demo_folder / name) as image:
            assert min(image.size) >= 80


def test_changed_answers_come_with_their_pictures(evaluations, tmp_path):
    from pmod_cli.demo import data

    result = write_report([evaluations / "both"], tmp_path / "both.html", include_path=evaluations / "tasks")
    page = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    rows = [
        json.loads(line)
        for line in (evaluations / "both" / "samples" / "shapes.jsonl").read_text().splitlines()
    ]
    worse = [row for row in rows if row["model"]["score"] < row["baseline"]["score"]]
    better = [row for row in rows if row["model"]["score"] > row["baseline"]["score"]]
    assert worse
    words = " ".join(page.sections["samples-that-differ"]["text"])
    assert (
        f"of {len(rows)} samples {len(better)} became right or better, {len(worse)} wrong or worse" in words
    )
    samples = data.heldout_samples(8)
    shown = page.sections["samples-that-differ"]["images"]
    assert len(shown) == min(8, len(worse) + len(better))
    for row, picture in zip(worse, shown, strict=False):
        assert row["prompt"] in words
        assert row["model"]["answer"] in words
        with Image.open(io.BytesIO(picture)) as image:
            assert np.array_equal(np.asarray(image), np.asarray(samples[row["doc_id"]].image))
    assert result["found"]["evaluations"] == 1


def test_differences_computed_here_are_the_evaluation_s(evaluations):
    """Evaluated one at a time, model and baseline get the very interval that `pmod eval --baseline` gives."""
    known = json.loads((evaluations / "both" / "results.json").read_text())["tasks"][0]["difference"]
    found = collect([evaluations / "apart"])
    models = gather(found)
    pmod, dense = main_model(models, found), reference(models, found)
    assert pmod is not None
    assert dense is not None
    assert (pmod.label, dense.label) == ("confused", "baseline")
    gap = compare(pmod, dense, "shapes")
    assert gap is not None
    assert (gap.points, gap.low, gap.high) == pytest.approx((known["points"], known["low"], known["high"]))
    # `eval --json` in a file: scores, and the difference, without samples.
    both = gather(collect([evaluations / "both"]))
    told = compare(both[1], both[0], "shapes")
    assert told is not None
    assert told.points == known["points"]


def profile_json(folder: Path, model: str, **settings: Any) -> Path:
    """A file with what ``pmod profile --json`` prints."""
    from tests.common.profiling_models import profile_checkpoint

    path = folder / "profile.json"
    result = profile_checkpoint(model, **settings)
    path.write_text(json.dumps({"schema_version": 1, "command": "profile", "result": result}))
    return path


@pytest.fixture(scope="module")
def paper_run(tmp_path_factory):
    """A profile of LLaVA-1.5-7B, and an evaluation on the paper's tasks, two points above the published."""
    folder = tmp_path_factory.mktemp("paper")
    profile = profile_json(folder, "llava-1.5-7b", convention="paper", counter="formula")
    ratios = json.loads(profile.read_text())["result"]["pmod"]["retention_ratios"]
    published = SCORES["llava"]

    def score(task, role):
        title = dict(zip(TASKS, published[role], strict=True))[task]
        value = published[role][title] + (40 if task == "mme" else 2)
        return {
            "value": value,
            "stderr": 20.0 if task == "mme" else 1.0,
            "samples": 9,
            "failed": 0,
            "metrics": {task: {}},
        }

    tasks = [
        {"name": task, "tasks": [task], "metric": "x,none", "scale": 100.0, "difference": None}
        | {role: score(task, role) for role in ("model", "baseline")}
        for task in TASKS
    ]
    described = {
        "fingerprint": None,
        "source": "run/pmod",
        "model_type": "pmod_llava",
        "retention_ratios": ratios,
    }
    results = {
        "schema_version": 1,
        "command": "eval",
        "tasks": tasks,
        "environment": {"pmod": "0"},
        "settings": {},
        "model": described,
        "baseline": described | {"source": "run/dense", "model_type": "llava", "retention_ratios": None},
    }
    (folder / "eval").mkdir()
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    return folder


def test_published_points_stand_in_the_same_plot_for_the_paper_s_tasks(paper_run, monkeypatch, tmp_path):
    drawn = {}

    def spy(ours, theirs, **options):
        drawn.update(ours=ours, theirs=theirs, **options)
        return real(ours, theirs, **options)

    real = figures.accuracy_figure
    monkeypatch.setattr(figures, "accuracy_figure", spy)
    write_report([paper_run], tmp_path / "paper.html")
    assert drawn["together"]
    ours = {point.label: point for point in drawn["ours"]}
    theirs = {point.label: point for point in drawn["theirs"]}
    assert [round(point.flops / 1e12, 2) for point in ours.values()] == [8.38, 4.93]
    assert [round(point.flops / 1e12, 2) for point in theirs.values()] == [8.38, 4.92]
    for point, other, role in zip(ours.values(), theirs.values(), ("baseline", "model"), strict=True):
        mean = average(SCORES["llava"][role])
        assert mean is not None
        assert other.accuracy == pytest.approx(mean)
        assert point.accuracy == pytest.approx(mean + 2)  # MME counts a twentieth
        assert point.error == pytest.approx(1.96 / 14**0.5)
        assert point.pmod == other.pmod == (role == "model")


def test_points_are_drawn_where_they_are():
    """In the SVG: two markers at different places, the p-MoD one in the p-MoD colour."""
    ours = [figures.Point("a", 4e12, 60.0, 1.0, False), figures.Point("b", 2e12, 62.0, None, True)]
    figure = figures.accuracy_figure(ours, [], together=False, what="points", caption="c")
    assert figure.svg is not None
    assert "var(--pmod)" in figure.svg
    assert "var(--dense)" in figure.svg
    uses = [
        (float(x), float(y))
        for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*fill: var', figure.svg)
    ]
    left, right = min(uses), max(uses)
    assert left[0] < right[0]
    assert left[1] < right[1]  # the p-MoD model is higher: y grows downwards


@pytest.mark.parametrize("part", ["models/pmod", "eval/eval-pmod", "steps/profile.json"])
def test_any_part_alone_makes_a_report(demo_folder, tmp_path, part):
    result = write_report([demo_folder / part], tmp_path / "part.html")
    expected = {"models": "Training", "eval": "Accuracy", "steps": "Cost"}[part.partition("/")[0]]
    assert expected in result["sections"]
    assert sum(result["found"].values()) == 1


def test_a_run_under_way_is_reported(demo_folder, tmp_path):
    work = tmp_path / "out.training"
    work.mkdir()
    whole = (demo_folder / "models" / "pmod" / "metrics.jsonl").read_text()
    (work / "metrics.jsonl").write_text(whole + '{"step": 3, "lo')  # a line that is being written
    result = write_report([work], tmp_path / "running.html")
    assert result["found"] == {"profiles": 0, "trainings": 1, "evaluations": 0}
    assert "out.training (not finished)" in (tmp_path / "running.html").read_text()


def test_a_broken_file_is_named_and_the_rest_reported(demo_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"tasks": [')
    with pytest.raises(PmodError, match=r"results\.json could not be read"):
        write_report([tmp_path / "run"], tmp_path / "x.html")
    places = [demo_folder / "eval" / "eval-pmod", tmp_path / "run", demo_folder / "steps" / "profile.json"]
    with pytest.raises(PmodError, match="holds no output"):
        write_report(places, tmp_path / "x.html")
    profile = tmp_path / "run" / "profile.json"
    profile.write_bytes((demo_folder / "steps" / "profile.json").read_bytes())
    result = write_report([tmp_path / "run"], tmp_path / "x.html")
    assert list(result["unread"]) == [str(tmp_path / "run" / "results.json")]
    assert "not read" in (tmp_path / "x.html").read_text()


def test_what_finetune_printed_stands_in_for_its_checkpoint(demo_folder, tmp_path):
    """The demo's steps hold what ``finetune --json`` printed: it counts where the checkpoint is not given too."""
    printed = demo_folder / "steps" / "finetune-pmod.json"
    assert write_report([printed], tmp_path / "a.html")["found"]["trainings"] == 1
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.row("recipe", "steps")[1] == str(step(demo_folder, "finetune-pmod")["steps"])
    both = write_report([printed, demo_folder / "models" / "pmod"], tmp_path / "b.html")
    assert both["found"]["trainings"] == 1
    assert "Training" in both["sections"]


def test_names_tell_models_apart():
    paths = ["a/x/pmod", "b/x/pmod", "c/dense"]
    assert short_names(paths, {}) == ["a/x/pmod", "b/x/pmod", "dense"]
    assert short_names(paths, {"a/x/pmod": "ours"}) == ["ours", "b/x/pmod", "dense"]


def test_text_is_text_in_both_forms():
    nasty = "<script>alert(1)</script> | *a* `b` [c](d) https://e.f www.g.h"
    document = Document(
        nasty, nasty, [Section("S", [Text(nasty), Table(nasty, ["", nasty], [["x", nasty]])])]
    )
    page = to_html(document)
    assert "<script>" not in page
    markdown, files = to_markdown(document, "files")
    assert files == {}
    row = next(line for line in markdown.splitlines() if line.startswith("| x"))
    assert row.count("|") - row.count("\\|") == 3
    assert "<script>" not in markdown.replace("\\<", "")
    # Sites make links of these.
    assert "://" not in markdown.replace("\\:", "")
    assert "www." not in markdown


def test_nothing_is_half_written(demo_folder, tmp_path, monkeypatch):
    """A page that exists stays as it is if the new one cannot be made."""
    target = tmp_path / "page.html"
    write_report([demo_folder / "steps" / "profile.json"], target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("pmod_cli.report.write.to_html", lambda document: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([demo_folder / "models" / "pmod"], target, force=True)
    assert target.read_bytes() == before[target]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_results_are_data(evaluations, tmp_path):
    """Neither the folder of tasks that results name is followed, nor a task's name or a link out of their folder."""
    strange = tmp_path / "strange"
    shutil.copytree(evaluations / "both", strange)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "shapes.yaml").write_text("task: shapes\ndoc_to_text: !function utils.run\n")
    (tmp_path / "code" / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nrun = None\n")
    results = json.loads((strange / "results.json").read_text())
    results["settings"]["include_path"] = [str(tmp_path / "code")]
    (strange / "results.json").write_text(json.dumps(results))
    (tmp_path / "secret.json").write_text(json.dumps({"command": "profile", "result": {}}))
    (strange / "link.json").symlink_to(tmp_path / "secret.json")
    result = write_report([strange], tmp_path / "page.html")
    assert result["found"]["evaluations"] == 1
    assert result["unread"] == {str(strange / "link.json"): "a link out of the folder"}
    assert not (tmp_path / "ran").exists()
    with pytest.raises(PmodError, match="no name of a task"):
        read_answers(strange, "../../secret")


@pytest.mark.parametrize("name", ["kept.html", "kept.md"])
def test_a_page_of_another_command_is_no_report_to_replace(tmp_path, name):
    (tmp_path / name).write_text(f"<!-- {TAG} -->")
    with pytest.raises(PmodError, match="is not of pmod report"):
        write_report([tmp_path], tmp_path / "kept.html", force=True)
