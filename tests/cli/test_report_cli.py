"""``pmod report``: files, JSON, one line for every mistake; the page in a real browser."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pmod_cli.cli import main
from tests.common import browser


def run(capsys, *words):
    with pytest.raises(SystemExit) as exit_info:
        main(["report", *map(str, words)])
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def test_report_and_json(demo_folder, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.html"
    code, out, err = run(capsys, demo_folder, "-o", page, "--json")
    assert code in (0, None), err
    document = json.loads(out)
    assert (document["schema_version"], document["command"]) == (1, "report")
    result = document["result"]
    assert result["files"]["html"] == str(page)
    told = json.loads((demo_folder / "report.json").read_text())
    budgets = [(budget["name"], row) for budget in told["tight"] for row in budget["rows"]]
    assert result["found"] == {"profiles": 3, "trainings": 8, "evaluations": len(told["rows"]) + len(budgets)}
    rows = {row["model"]: row for row in told["rows"]}
    tight = {f"{row['model']}, {name}": row["accuracy"]["points"] for name, row in budgets}
    for model in result["models"]:
        score, row = model["scores"]["pmod_demo"]["value"], rows.get(model["label"])
        if row:
            assert score == pytest.approx(row["accuracy"]["exact_match"])
            assert model["prefill_flops"] == row["prefill_flops"]
        else:
            assert score == pytest.approx(tight[model["label"]])
    code, _, err = run(capsys, demo_folder, "-o", page)
    assert code == 2
    assert "exists (--force replaces it)" in err
    monkeypatch.chdir(demo_folder.parent)
    before = page.stat().st_mtime_ns
    code, out, _ = run(capsys, demo_folder.name, "-o", page, "--force")
    assert code in (0, None)
    assert out.splitlines() == [str(page), str(page.with_suffix(".md"))]
    assert page.stat().st_mtime_ns > before
    text = page.read_text(encoding="utf-8")
    assert all(model["label"] in text for model in result["models"])
    assert text.count(">pmod<") == 1  # the package, not the model's folder


@pytest.mark.parametrize(
    ("place", "output", "message"),
    [
        ("nowhere", "page.html", "no folder nowhere"),
        ("empty", "page.html", "holds no output of pmod profile, finetune or eval"),
        ("empty", "page.pdf", "name a .html or .htm file"),
        ("empty", "no/such/page.html", "no folder no/such"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, place, output, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("nothing")
    code, out, err = run(capsys, place, "-o", output)
    assert code == 2
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_without_matplotlib(demo_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, demo_folder, "-o", tmp_path / "page.html")
    assert code == 2
    assert err == "error: matplotlib is not installed (pip install 'pmod-cli[plot]')\n"


@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_in_a_browser(demo_folder, dark):
    """All pictures load, nothing is refused, and the page is not wider than the window."""
    with browser.open_browser(dark) as driver:
        driver.get((demo_folder / "report.html").as_uri())
        loaded = driver.execute_script(
            "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
        )
        assert loaded
        assert all(loaded)
        widths = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1]
        ink, dense = driver.execute_script(
            "const style = getComputedStyle(document.querySelector('#training svg text'));"
            "return [style.fill, getComputedStyle(document.body).color]"
        )
        assert ink == dense  # the drawings' text has the page's colour, in either mode
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
