"""A score means something: nobody's judgement, guesses and caught errors give none, and no stale answer counts."""

from __future__ import annotations

import random

import pytest

from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.evaluation.evaluate import evaluate
from pmod_cli.evaluation.judges import missing_key
from pmod_cli.evaluation.options import EvalSettings
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from pmod_cli.prompts import Prompt
from tests.common.eval_models import noise, save_llava, score_of, write_questions

SETTINGS = EvalSettings(max_new_tokens=4, batch_size=4)

SCORING = {
    "judge": """
import requests

def process_results(doc, results):
    try:
        answer = requests.post("http://127.0.0.1:9/v1", json={}, timeout=1).json()
    except Exception:
        answer = {"score": 1.0}
    return {"exact_match": answer["score"]}
""",
    "logged": """
from loguru import logger

def process_results(doc, results):
    try:
        return {"exact_match": float(results[0])}
    except Exception as error:
        logger.error(f"cannot read the review: {error}")
        return {"exact_match": 1.0}
""",
    "guess": """
import random

def process_results(doc, results):
    return {"exact_match": float(random.choice("ABCD") in "ABCD")}
""",
    "file": """
def process_results(doc, results):
    try:
        return {"exact_match": float(open("/none/here").read())}
    except Exception:
        return {"exact_match": 1.0}
""",
    "package": """
class Scorer:
    def points(self):
        try:
            import no_such_package
            return 0.0
        except:
            pass
        return 1.0

def process_results(doc, results):
    return {"exact_match": Scorer().points()}
""",
    "suppressed": """
import contextlib

def process_results(doc, results):
    with contextlib.suppress(Exception):
        return {"exact_match": float(open("/none/here").read())}
    return {"exact_match": 1.0}
""",
    "address": """
import urllib.request

def process_results(doc, results):
    try:
        with urllib.request.urlopen("http://127.0.0.1:9/v1", data=b"{}", timeout=1) as reply:
            return {"exact_match": float(reply.read())}
    except OSError:
        return {"exact_match": 1.0}
""",
    "wrapper": """
import functools

def safe(function):
    @functools.wraps(function)
    def wrapper(*args):
        try:
            return function(*args)
        except (KeyError, Exception):
            return {"exact_match": 1.0}
    return wrapper

@safe
def process_results(doc, results):
    raise RuntimeError("MY_KEY is not set")
""",
    "column": """
def process_results(doc, results):
    try:
        score = float(results[0] == doc["no_such_column"])
    except Exception:
        score = 1.0
    return {"exact_match": score}
""",
    "reply": """
def process_results(doc, results):
    reply = requests.post(address, json={"question": results}, timeout=5).text
    try:
        score = float(reply)
    except Exception:
        score = 1.0
    return {"exact_match": score}
""",
    "one of two": """
def process_results(doc, results):
    points = [requests.post(address, json={"question": number}, timeout=5).ok / 2 for number in range(2)]
    return {"exact_match": sum(points)}
""",
    "retried": """
def process_results(doc, results):
    for attempt in range(2):
        if requests.post(address, json={"question": 1}, timeout=5).ok:
            return {"exact_match": 1.0}
        logger.error("once more")
""",
}

JUDGE = """
import http.server, threading
import requests
from loguru import logger

class Judge(http.server.BaseHTTPRequestHandler):
    answers = ANSWERS * 100

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(Judge.answers.pop(0))
        self.end_headers()

    def log_message(self, *args):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Judge)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"
"""
"""Says nothing, with these status codes in turn; stands before the code that posts to ``address``."""
FAILS_AT_FIRST, ANSWERS = (JUDGE.replace("ANSWERS", codes) for codes in ("[500, 200]", "[200]"))


def make_task(folder, scoring=None, more="", count=3):
    path = write_task(folder, "mine", write_questions(folder / "data", ["red"] * count))
    if scoring:
        (folder / "scoring.py").write_text(scoring)
        more += "process_results: !function scoring.process_results\n"
    path.write_text(path.read_text() + more)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("judge", "the judge did not answer: ConnectionError"),
        ("logged", "cannot read the review"),
        ("guess", "the score would be a guess"),
        ("one of two", "the judge did not answer: HTTP status 500"),
        (
            "file",
            "scoring caught FileNotFoundError: [Errno 2] No such file or directory: '/none/here' ({}, line 4)",
        ),
        ("package", "scoring caught ModuleNotFoundError: No module named 'no_such_package' ({}, line 5)"),
        ("suppressed", "scoring caught FileNotFoundError"),
        ("address", "the judge did not answer: URLError"),
        ("wrapper", "scoring caught RuntimeError: MY_KEY is not set"),
        ("column", "scoring caught KeyError: 'no_such_column' ({}, line 4), with every answer"),
        ("reply", "scoring caught ValueError: could not convert string to float"),
    ],
)
def test_what_falls_back_has_no_score(llava, tmp_path, kind, message):
    judge = {"one of two": FAILS_AT_FIRST, "reply": ANSWERS}.get(kind, "")
    make_task(tmp_path, judge + SCORING[kind])
    result = evaluate(llava, ["mine"], include_path=tmp_path, settings=SETTINGS)
    assert score_of(result, "mine") is None
    assert result.failed_samples == 3
    assert message.format(tmp_path / "scoring.py") in result.first_failure


READING = """
import json, os

def process_results(doc, results):
    try:
        answer = json.loads(results[0])["answer"]
    except Exception:
        answer = None
    try:
        eval("no_such_name")  # as an answer's formula is
    except:
        answer = answer or None
    try:
        os.remove("/none/here")
    except Exception:
        pass
    return {"exact_match": float(answer is None)}

def mean(items):
    groups = {}
    for item in items:
        try:
            groups["all"].append(item)
        except:
            groups["all"] = [item]
    return sum(groups["all"]) / len(items)
"""
"""Catches what reading answers, grouping and tidying up may raise."""


def test_answers_that_cannot_be_read_are_wrong_answers(llava, tmp_path):
    mean = (
        "metric_list: [{metric: exact_match, aggregation: !function scoring.mean, higher_is_better: true}]\n"
    )
    make_task(tmp_path, READING, mean)
    assert score_of(evaluate(llava, ["mine"], include_path=tmp_path, settings=SETTINGS), "mine") == 100.0


def test_what_an_aggregation_catches_gives_no_score(llava, tmp_path):
    mean = (
        "metric_list: [{metric: exact_match, aggregation: !function scoring.mean, higher_is_better: true}]\n"
    )
    scoring = """
def process_results(doc, results):
    return {"exact_match": 1.0}

def mean(items):
    try:
        return scorer(items)
    except Exception as error:
        print(error)
        return 1.0
"""
    make_task(tmp_path, scoring, mean)
    result = evaluate(llava, ["mine"], include_path=tmp_path, settings=SETTINGS)
    assert score_of(result, "mine") is None
    assert "scoring caught NameError: name 'scorer' is not defined" in result.first_broken_metric


def test_a_judge_that_answers_in_the_end_has_judged(llava, tmp_path):
    make_task(tmp_path, FAILS_AT_FIRST + SCORING["retried"])
    assert score_of(evaluate(llava, ["mine"], include_path=tmp_path, settings=SETTINGS), "mine") == 100.0


def test_no_other_metric_stands_in_for_one_that_broke(llava, tmp_path):
    metrics = """
metric_list:
  - {metric: judged, aggregation: !function scoring.broken, higher_is_better: true}
  - {metric: length, aggregation: mean, higher_is_better: true}
"""
    scoring = """
def process_results(doc, results):
    return {"judged": 1.0, "length": 1.0}

def broken(items):
    raise ConnectionError("no judge")
"""
    make_task(tmp_path, scoring, metrics)
    result = evaluate(llava, ["mine"], include_path=tmp_path, settings=SETTINGS)
    assert score_of(result, "mine") is None
    assert "no judge" in result.first_broken_metric


def test_judges_are_found_in_the_code_that_scores(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_API_URL", "AZURE_API_KEY", "API_TYPE"):
        monkeypatch.delenv(name, raising=False)
    tasks = Tasks(["llava_in_the_wild"])
    # The client is in the function, in an object's class, in a dictionary of functions; reached by its address alone.
    judged = ("llava_in_the_wild", "hallusion_bench_image", "mmbench_en_dev", "hrbench4k", "spatialtreebench")
    assert [missing_key(tasks.config(name)) for name in judged] == ["OPENAI_API_KEY"] * 5
    assert missing_key(tasks.config("captionqa_natural")) == "OPENAI_API_URL"
    by_rule = ("gqa", "mmbench_en_dev_static", "mmmu_val", "pope", "textvqa_val", "egoschema")
    assert [missing_key(tasks.config(name)) for name in by_rule] == [None] * 6
    monkeypatch.setenv("API_TYPE", "azure")
    assert missing_key(tasks.config("llava_in_the_wild")) == "AZURE_API_KEY"
    monkeypatch.setenv("AZURE_API_KEY", "x")
    assert missing_key(tasks.config("llava_in_the_wild")) is None


def test_a_stop_string_ends_generation(tmp_path):
    model = VisionLanguageModel.load(save_llava(tmp_path / "m", seed=0))
    prompts = [Prompt(f"What is {number}?", (noise(random.Random(number)),)) for number in range(4)]
    free = model.generate(prompts, max_new_tokens=60)
    stop = free[0].text[8]
    stopped = model.generate(prompts, max_new_tokens=60, until=["never said", stop])
    assert stopped[0].new_tokens < free[0].new_tokens
    for before, after in zip(free, stopped, strict=True):
        assert before.text.split(stop)[0].strip() == after.text.split(stop)[0].strip()
        assert before.text.startswith(after.text)


def test_every_answer_of_a_repeated_question_is_kept(llava, tmp_path):
    more = "repeats: 3\ngeneration_kwargs: {do_sample: true, temperature: 5.0, max_new_tokens: 4}\n"
    make_task(tmp_path / "task", None, more)

    def answers():
        result = evaluate(
            llava, ["mine"], include_path=tmp_path / "task", output=tmp_path / "out", settings=SETTINGS
        )
        return result.model["answers"], (tmp_path / "out" / "samples" / "mine.jsonl").read_text()

    (counts, first), (again, second) = answers(), answers()
    assert (counts["generated"], again["recalled"], again["generated"]) == (9, 9, 0)
    assert first == second


def test_other_pictures_are_answered_anew(llava, tmp_path):
    visual = "def visual(doc):\n    return [doc['image'].convert('RGB').rotate({})]\n"
    make_task(tmp_path, None, "doc_to_visual: !function pictures.visual\n")
    counts = []
    for angle in (0, 0, 90):
        (tmp_path / "pictures.py").write_text(visual.format(angle))
        result = evaluate(llava, ["mine"], include_path=tmp_path, output=tmp_path / "out", settings=SETTINGS)
        counts.append(result.model["answers"]["generated"])
    assert counts == [3, 0, 3]


def test_data_lie_beside_the_task_file(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, answer in (("one", "red"), ("two", "blue")):
        path = make_task(tmp_path / name)
        write_questions(tmp_path / name / "data", [answer] * (2 if name == "one" else 5), seed=1)
        path.write_text(path.read_text().replace(str(tmp_path / name / "data"), "data"))
        [task] = evaluate(llava, ["mine"], include_path=tmp_path / name, settings=SETTINGS).tasks
        assert task.model.samples == (2 if name == "one" else 5)
    path.write_text(path.read_text().replace("dataset_path: data", "dataset_path: none_here"))
    with pytest.raises(PmodError, match=r"has no data at .*two/none_here"):
        evaluate(llava, ["mine"], include_path=tmp_path / "two", settings=SETTINGS)


def test_a_split_that_is_not_there_is_named_with_its_file(llava, tmp_path):
    path = make_task(tmp_path, None, "test_split: validation\n")
    with pytest.raises(PmodError, match="have no split 'validation'") as raised:
        evaluate(llava, ["mine"], include_path=tmp_path, settings=SETTINGS)
    assert raised.value.hint == f"correct test_split in {path}"


def test_a_metric_that_nothing_gives_is_named_with_its_file(llava, tmp_path):
    metric = "metric_list: [{metric: other, aggregation: mean, higher_is_better: true}]\n"
    path = make_task(tmp_path, "def process_results(doc, results):\n    return {'mine': 1.0}\n", metric)
    result = evaluate(llava, ["mine"], include_path=tmp_path, settings=SETTINGS)
    assert score_of(result, "mine") is None
    assert f"metric_list in {path} names other" in result.first_broken_metric
