"""Which of a task's numbers is its score, and what each sample adds to it.

The table `METRICS` is all there is to know about the paper's tasks; any other task is scored by its first metric.
Where a metric is not simply a mean over samples, the units that it counts in are built from what lmms-eval logs for
each sample, with lmms-eval's own functions, so that errors and intervals belong to the very score that is shown.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from pmod_cli.evaluation.stats import Ratio, Strata, Stratum

Sample = dict[str, Any]
Units = dict[str, dict[Any, Ratio]]


class Metric(NamedTuple):
    """How a task is scored.

    Attributes:
        key: lmms-eval's name for the number: ``metric,filter``.
        scale: What it is multiplied with to be in points: 100 for a share.
        value: A single sample's score from what the metric logged for it.
        units: What the score is made of: by stratum, what each of its units adds; None if that is not known.
    """

    key: str
    scale: float
    value: Callable[[Any], float]
    units: Callable[[Sequence[Sample], Metric], Units] | None

    @property
    def name(self) -> str:
        """The metric without its filter, as samples have it."""
        return self.key.split(",")[0]


def _value(logged: Any) -> float:
    """A sample's score from what a metric logged: a number, or a record that says right or wrong."""
    if isinstance(logged, dict):
        if "score" in logged:
            return float(logged["score"])
        return float(str(logged["pred"]).strip().lower() == str(logged["answer"]).strip().lower())
    return float(logged)


def _mmmu_value(logged: dict[str, Any]) -> float:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return float(evaluate_mmmu([logged])[1]["acc"])


def _mmbench_hit(*group: dict[str, Any]) -> float:
    """Whether all circular shifts of a question were answered rightly."""
    import pandas  # type: ignore[import-untyped]  # ships no types
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    answers = {row["index"]: row["answer"] for row in group}
    return float(mmbench_evaluator.eval_sub_data(pandas.DataFrame(list(group)), answers, static_only=True))


def _means(samples: Sequence[Sample], metric: Metric) -> Units:
    logged = {sample["doc_id"]: sample["metrics"].get(metric.name) for sample in samples}
    return {"": {key: (metric.value(value), 1.0) for key, value in logged.items() if value is not None}}


def _mme_units(samples: Sequence[Sample], metric: Metric) -> Units:
    """MME: per category the mean over question pairs of accuracy and of both right, in percent; then the sum."""
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if logged := sample["metrics"].get(metric.name):
            pairs[logged["category"]][logged["question_id"]].append(logged["score"])
    return {
        category: {key: (100 * (sum(both) / len(both) + all(both)), 1.0) for key, both in questions.items()}
        for category, questions in pairs.items()
    }


def _f1_units(samples: Sequence[Sample], metric: Metric) -> Units:
    """F1 is 2 TP over (said yes + is yes); an answer that is neither yes nor no is left out, as lmms-eval does."""
    units: dict[Any, Ratio] = {}
    for sample in samples:
        logged = sample["metrics"][metric.name]
        said, truth = logged["prediction"], logged["ground_truth"]
        predicted, positive = said == "yes", truth == "yes" and said in ("yes", "no")
        units[sample["doc_id"]] = (2.0 * (said == truth == "yes"), float(predicted + positive))
    return {"": units}


def _mmbench_units(samples: Sequence[Sample], metric: Metric) -> Units:
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        logged = sample["metrics"][metric.name]
        groups[int(logged["index"]) % 1_000_000].append(logged)
    # lmms-eval counts a question only if its first, unshifted form is there, and gives this task's score in percent.
    whole = {i: group for i, group in groups.items() if any(int(row["index"]) == i for row in group)}
    return {"": {index: (100 * _mmbench_hit(*group), 1.0) for index, group in whole.items()}}


_EXACT_MATCH = Metric("exact_match,none", 100.0, _value, _means)
_POPE_F1 = Metric("pope_f1_score,none", 100.0, _value, _f1_units)  # as LLaVA-1.5 reports POPE (85.9)
_ANLS = Metric("anls,none", 100.0, _value, _means)

METRICS = {
    "ok_vqa_val2014": _EXACT_MATCH,  # VQA accuracy over ten answers
    "scienceqa_img": _EXACT_MATCH,  # on questions with a picture
    # The perception score, at most 2000 (paper, table 1).
    "mme": Metric("mme_perception_score,none", 1.0, _value, _mme_units),
    # Questions on single pictures: LLaVA-1.5's 66.2 is seed_image, its seed_all is 58.6.
    "seedbench": Metric("seed_image,none", 100.0, _value, _means),
    "pope_adv": _POPE_F1,
    "pope_pop": _POPE_F1,
    "pope_random": _POPE_F1,
    "realworldqa": _EXACT_MATCH,
    "gqa": _EXACT_MATCH,  # on testdev-balanced
    "ai2d": Metric("exact_match,flexible-extract", 100.0, _value, _means),
    "textvqa_val": _EXACT_MATCH,  # VQA accuracy, no OCR tokens in the prompt
    # 5 % tolerance, human and augmented questions together.
    "chartqa": Metric("relaxed_overall,none", 100.0, _value, _means),
    "docvqa_val": _ANLS,
    "infovqa_val": _ANLS,
    # Circular evaluation; option letters parsed without a judge.
    "mmbench_en_dev_static": Metric("gpt_eval_score,none", 1.0, _mmbench_hit, _mmbench_units),
    # The same, but a paid judge reads answers without an option letter.
    "mmbench_en_dev": Metric("gpt_eval_score,none", 1.0, _mmbench_hit, None),
    "mmmu_val": Metric("mmmu_acc,none", 100.0, _mmmu_value, _means),  # micro average
}


def metric_of(
    task: str, config: dict[str, Any], numbers: dict[str, float], broken: Collection[str] = ()
) -> Metric | None:
    """How a task is scored, by its YAML and what lmms-eval aggregated (``metric,filter`` to value); None for none.

    No other metric stands in for one that is ``broken``.
    """
    if task in METRICS:
        return METRICS[task]
    order = [str(entry["metric"]) for entry in config.get("metric_list") or []]
    order = list(itertools.takewhile(lambda name: name not in broken, order))
    known = [key for name in order for key in numbers if key.split(",")[0] == name]
    known = known or ([] if broken else list(numbers))
    if not known:
        return None
    return Metric(known[0], 100.0 if 0 <= numbers[known[0]] <= 1 else 1.0, _value, _means)


def sample_score(metric: Metric | None, sample: Sample) -> float | None:
    """A sample's own score, usually 0 or 1; None if the metric logged nothing for it that can be read so."""
    if metric is None or metric.name not in sample["metrics"] or sample["error"]:
        return None
    try:
        return metric.value(sample["metrics"][metric.name])
    except (KeyError, TypeError, ValueError):
        return None


def strata_of(metric: Metric | None, samples: Sequence[Sample]) -> Strata | None:
    """What the task's score is made of, or None if that is not known."""
    if metric is None or metric.units is None:
        return None
    try:
        found = metric.units(samples, metric)
    except (KeyError, TypeError, ValueError):
        return None
    return {name: Stratum(metric.scale, units) for name, units in found.items()}
