"""A calibration from beginning to end: answers, routers, ratios, strength of coverage, judgement, checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from pmod_cli import __version__
from pmod_cli.calibration.bench import Bench, Kept, Progress
from pmod_cli.calibration.fit import Fitted
from pmod_cli.calibration.options import CalibrateOptions
from pmod_cli.calibration.plot import draw
from pmod_cli.calibration.questions import Question, draw_questions
from pmod_cli.calibration.schedules import LEAST, LEVELS, search, shapes
from pmod_cli.calibration.selection import Selection, controls, fitted
from pmod_cli.calibration.subject import Costs, Subject, stored
from pmod_cli.checkpoints.shards import StoredTensor, encode
from pmod_cli.checkpoints.write import check_destination
from pmod_cli.conversion.calibrated import CheckpointBase
from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import layer_table
from pmod_cli.data.dataset import open_data
from pmod_cli.evaluation.stats import Difference
from pmod_cli.modeling.schedule import Ratios, shifted_cosine
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import tag, to_json
from pmod_cli.output.paths import public_name

SCALE = 0.01
"""Standard deviation of the fitted logits: with TanhNorm's 0.2 weights stay within some 0.5 % of 1."""

STRENGTHS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Strengths of coverage that are tried, in standard deviations of the logit."""

START = 8.0
"""The strength while ratios are searched."""

FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Multiples of the chosen ratios on the curve."""

PLOT, REPORT = "calibration.png", "calibration.json"


def calibrate(options: CalibrateOptions, progress: Progress) -> dict[str, Any]:
    """Calibrate a checkpoint and write the result.

    Returns:
        What ``docs/json.md`` lists for ``pmod calibrate --json``; ``calibration.json`` holds the same.

    Raises:
        PmodError: Bad options, model or data; a budget that cannot be met; the destination exists.
    """
    started = time.perf_counter()
    options.check()
    local = Path(options.model)
    folder = local if local.is_dir() else None
    check_destination(options.output, folder, options.force, [options.data, options.images])
    base = CheckpointBase.open(options.model)
    if options.schedule == "own" and base.source.model_type != base.family.model_type:
        raise PmodError(f"{options.model} is dense and has no schedule of its own", "--schedule paper")
    data = open_data(options.data, options.images)
    questions = draw_questions(data, options.samples, options.seed)
    logging.disable_progress_bar()  # one bar is enough
    subject = Subject.load(base, options.dtype, options.device)
    costs = Costs.of(base, subject, [each for part in questions.values() for each in part])
    named = _named_schedules(options, subject, costs)
    with Kept.keeping(options.output, _digest(options, base, data.fingerprint)) as kept:
        bench = Bench.answer(subject, questions, kept, progress, options.batch_size, options.max_new_tokens)
        found = _Search(options, base, subject, costs, bench, named).run()
        found |= {"seconds": time.perf_counter() - started}
        return _written(options, base, questions, costs, found)


def _written(
    options: CalibrateOptions,
    base: CheckpointBase,
    questions: Mapping[str, Sequence[Question]],
    costs: Costs,
    found: dict[str, Any],
) -> dict[str, Any]:
    """Write the checkpoint; the result, complete."""
    found = {
        "model": base.source.name,
        "destination": str(options.output),
        "family": base.family.name,
        "questions": {part: len(each) for part, each in questions.items()},
        "pictures": len({each.picture for part in questions.values() for each in part}),
        "workload": {
            "vision_tokens": costs.work.vision_tokens,
            "text_tokens": costs.work.text_tokens,
        },
        **found,
    }
    mod, selection = found.pop("mod"), found.pop("selection")
    notes = []
    files = {}
    try:
        files[PLOT] = draw(found)
    except PmodError as error:
        notes.append(f"no {PLOT}: {error}")
    found |= {"notes": notes}
    shared = {"model": public_name(base.source.name), "destination": options.output.name}
    files[REPORT] = to_json({**tag("calibrate"), **found, **shared})
    summary = {
        "version": __version__,
        "model": shared["model"],
        "replaced": found["replaced"],
        "schedule": found["schedule"],
    }
    plan = base.plan(mod, _tensors(base, mod, selection), summary, files)
    convert(plan, options.output, force=options.force)
    return found


def _digest(options: CalibrateOptions, base: CheckpointBase, data: str) -> str:
    weights = [
        (tensor.name, tensor.dtype, list(tensor.shape))
        for shard in base.translation.shards
        for tensor in shard.tensors
    ]
    stats = [
        (shard.name, shard.linked.stat().st_size, shard.linked.stat().st_mtime_ns)
        for shard in base.translation.shards
        if shard.linked is not None
    ]
    parts = [__version__, options.settings, base.source.config, weights, stats, data, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _named_schedules(options: CalibrateOptions, subject: Subject, costs: Costs) -> dict[str, Ratios]:
    """The schedules that are known before anything is measured, by name."""
    if options.flops is not None or options.kv is not None:
        budget, cost = (options.flops, costs.flops) if options.flops is not None else (options.kv, costs.kv)
        assert budget is not None
        found = shapes(subject.layers, budget, cost)
        if not found:
            least = cost([LEAST] * subject.layers)
            kind = "flops" if options.flops is not None else "kv"
            raise PmodError(
                f"--{kind} {budget:g} cannot be met: {least:.3f} is left if hardly any vision token is kept",
                f"give more than {least:.3f}",
            )
        return found
    if subject.ratios is not None and options.schedule != "paper":
        return {"own": subject.ratios}
    return {"paper": shifted_cosine(subject.layers)}


@dataclass
class _Search:
    """The choices, in their order."""

    options: CalibrateOptions
    base: CheckpointBase
    subject: Subject
    costs: Costs
    bench: Bench
    schedules: dict[str, Ratios]

    def run(self) -> dict[str, Any]:
        """All of the result that is measured; and ``mod`` and ``selection``, which are to be written."""
        bench, searching = self.bench, self.options.flops is not None or self.options.kv is not None
        judged = len(controls()) + 2 + (self.subject.own is not None)
        searched = len(LEVELS) * self.subject.layers + len(self.schedules) + 1 if searching else 0
        bench.expected = searched + len(STRENGTHS) + judged + 4 * len(FACTORS)
        routers = bench.fit()
        if searching:
            self._search(routers)
        name = self._best_schedule(routers)
        ratios = self.schedules[name]
        strength = self._best_strength(routers, ratios)
        candidate = self._fitted(routers, strength)
        rivals = [*controls(), *([self.subject.own] if self.subject.own else [])]
        rows = [self._row(Selection("dense"), [None] * len(ratios), None)]
        rows += [self._row(each, ratios, candidate) for each in rivals]
        rows.append(self._row(candidate, ratios, None))
        beaten = {row["name"]: row["gain"]["divergence"]["low"] > 0 for row in rows if row["gain"]}
        replaced = all(beaten.values())
        chosen = candidate if replaced else self.subject.own or Selection("shifted spread")
        written = next(row for row in rows if row["name"] == chosen.name)
        coverage = chosen.coverage if isinstance(chosen.coverage, float) else list(chosen.coverage)
        mod = replace(self.subject.routable.mod, retention_ratios=list(ratios), coverage=coverage)
        return {
            "budget": {"flops": self.options.flops, "kv": self.options.kv},
            "schedule": name,
            "layers": layer_table(mod),
            "coverage": coverage,
            "flops": self.costs.flops(ratios),
            "kv": self.costs.kv(ratios),
            "replaced": replaced,
            "not_beaten": [each for each, won in beaten.items() if not won],
            "strength": strength,
            "routers": [
                {"layer": layer, "explained": router.explained, "penalty": router.penalty}
                for layer, router in routers.items()
                if ratios[layer] is not None
            ],
            "selections": rows,
            "schedules": self._schedules(chosen),
            "curve": self._curve(ratios, chosen, replaced),
            "agreement": written["agreement"],
            "divergence": written["divergence"],
            "mod": mod,
            "selection": chosen,
        }

    def _fitted(self, routers: dict[int, Fitted], strength: float) -> Selection:
        return stored(fitted(routers, strength, SCALE), self.base.router_dtype)

    def _search(self, routers: dict[int, Fitted]) -> None:
        budget, cost = (
            (self.options.flops, self.costs.flops)
            if self.options.flops is not None
            else (self.options.kv, self.costs.kv)
        )
        assert budget is not None
        background = self.schedules.get("constant") or next(iter(self.schedules.values()))
        start = self._fitted(routers, START)
        self.schedules["searched"] = search(
            background, budget, cost, lambda ratios: self.bench.divergence("fit", ratios, start, "retention")
        )

    def _best_schedule(self, routers: dict[int, Fitted]) -> str:
        if len(self.schedules) == 1:
            return next(iter(self.schedules))
        start = self._fitted(routers, START)
        return min(
            self.schedules,
            key=lambda name: self.bench.divergence("choose", self.schedules[name], start, "schedules"),
        )

    def _best_strength(self, routers: dict[int, Fitted], ratios: Ratios) -> float:
        return min(
            STRENGTHS,
            key=lambda strength: self.bench.divergence(
                "choose", ratios, self._fitted(routers, strength), "coverage"
            ),
        )

    def _row(self, selection: Selection, ratios: Ratios, candidate: Selection | None) -> dict[str, Any]:
        """A selection on the questions that decide; its gain is the candidate's over it."""
        judged = self.bench.outcome("judge", ratios, selection, "judgement")
        gain = None
        if candidate is not None:
            ours = self.bench.outcome("judge", ratios, candidate, "judgement")
            gain = {
                "divergence": _interval(self.bench.compare("judge", judged.divergence, ours.divergence)),
                "agreement": _interval(self.bench.compare("judge", ours.agreement, judged.agreement)),
            }
        return {
            "name": selection.name,
            "divergence": _interval(self.bench.compare("judge", judged.divergence)),
            "agreement": _interval(self.bench.compare("judge", judged.agreement)),
            "gain": gain,
        }

    def _schedules(self, chosen: Selection) -> list[dict[str, Any]]:
        if len(self.schedules) == 1:
            return []
        return [
            {
                **self._row(chosen, ratios, None),
                "name": name,
                "ratios": list(ratios),
                "flops": self.costs.flops(ratios),
                "kv": self.costs.kv(ratios),
            }
            for name, ratios in self.schedules.items()
        ]

    def _curve(self, ratios: Ratios, chosen: Selection, replaced: bool) -> list[dict[str, Any]]:
        """Agreement against FLOPs: the chosen ratios times some factors, and the paper's schedule at those costs."""
        points = []
        for factor in FACTORS:
            scaled = [None if ratio is None else min(ratio * factor, 1.0) for ratio in ratios]
            flops = self.costs.flops(scaled)
            same, _, random = controls()
            variants = [("spread", same, scaled), ("random", random, scaled)]
            variants.append(("calibrated" if replaced else chosen.name, chosen, scaled))
            paper = shapes(len(ratios), flops, self.costs.flops).get("paper")
            if paper is not None:
                variants.append(("paper's schedule", chosen, paper))
            for name, selection, kept in variants:
                outcome = self.bench.outcome("judge", kept, selection, "curve")
                points.append(
                    {
                        "name": name,
                        "flops": self.costs.flops(kept),
                        "agreement": _interval(self.bench.compare("judge", outcome.agreement)),
                    }
                )
        return points


def _interval(found: Difference) -> dict[str, float]:
    return {"mean": found.points, "low": found.low, "high": found.high}


def _tensors(base: CheckpointBase, mod: MoDConfig, selection: Selection) -> dict[str, StoredTensor]:
    """Routers of the layers that route, as they are stored, by name; none where all are zero."""
    if not selection.routers:
        return {}
    found, dtype, hidden = {}, base.layout.dtype, base.layout.hidden
    for layer in mod.mod_layers:
        weight, bias = selection.routers.get(layer, (torch.zeros(hidden), torch.zeros(1)))
        for part, value, shape in (("weight", weight, (1, hidden)), ("bias", bias, (1,))):
            if value is not None:
                name = base.layout.router_name(layer, part)
                data = encode(value.detach().float().cpu().reshape(-1).numpy(), dtype)
                found[name] = StoredTensor.from_bytes(name, dtype, shape, data)
    return found
