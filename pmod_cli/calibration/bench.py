"""The questions of a calibration with the dense model's answers; every variant is measured on them once."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmod_cli.calibration.fit import FLOOR, Fitted, Moments, fit
from pmod_cli.calibration.measure import Outcome, measure
from pmod_cli.calibration.observe import observing
from pmod_cli.calibration.questions import Question
from pmod_cli.calibration.reference import Batch, answered
from pmod_cli.calibration.routable import Ratios
from pmod_cli.calibration.selection import Selection
from pmod_cli.calibration.subject import Subject
from pmod_cli.evaluation.stats import Difference, compare_means
from pmod_cli.generation import fitting
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import check_place, folders_above, locked, open_folder, remove_folder, write_json
from pmod_cli.output.marks import MARKER
from pmod_cli.output.reading import read_json, read_json_lines

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, of how much."""

_HOLDS = ("settings.json", "measured.jsonl", "answers-*.json", ".*.partial")
"""What the folder of `Kept` holds."""


class Kept:
    """What was measured before, in a folder that pmod works in; see `keeping`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes = {row[0]: Outcome(*map(np.array, row[1:])) for row in read_json_lines(self._measured)}

    @staticmethod
    @contextlib.contextmanager
    def keeping(output: Path, digest: str) -> Iterator[Kept]:
        """Go on with what an interrupted calibration left in a hidden folder beside its output, and keep others out.

        When all is done the folder is removed.

        Args:
            output: The output.
            digest: Of everything that the results depend on; what was left under another one is thrown away.

        Raises:
            PmodError: Another process calibrates into the same output.
        """
        folder = output.absolute().parent / f".{output.name}.calibrating"
        check_place(folder, True, names=_HOLDS)
        with contextlib.ExitStack() as stack:
            stack.enter_context(folders_above(folder))
            open_folder(folder, _HOLDS)
            stack.enter_context(locked(folder, output))
            mark = folder / "settings.json"
            try:
                if not mark.is_file() or _digest_of(mark) != digest:
                    for path in folder.iterdir():
                        if path.name != MARKER:
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                    write_json(mark, {"digest": digest})
                yield Kept(folder)
            except BaseException:
                if {each.name for each in folder.iterdir()} <= {MARKER, mark.name}:
                    remove_folder(folder)
                raise
            remove_folder(folder)

    @property
    def _measured(self) -> Path:
        return self.folder / "measured.jsonl"

    def add(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome."""
        self.outcomes[key] = outcome
        row = [key, outcome.divergence.tolist(), outcome.agreement.tolist()]
        with self._measured.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def answers(self, part: str, number: int) -> Path:
        """Where a batch's answers are kept."""
        return self.folder / f"answers-{part}-{number}.json"


def _digest_of(mark: Path) -> object:
    try:
        return read_json(mark).get("digest")
    except PmodError:  # a full disk, or a user's hand
        return None


@dataclass
class Bench:
    """Measures variants.

    Attributes:
        batches: By part, prompts with the dense model's answers.
        pictures: By part, each sample's picture.
        made: How many variants were measured, those kept from before included.
    """

    subject: Subject
    kept: Kept
    progress: Progress
    batches: dict[str, list[Batch]]
    pictures: dict[str, list[str]]
    made: int = 0
    expected: int = 0

    @classmethod
    def answer(
        cls,
        subject: Subject,
        questions: Mapping[str, Sequence[Question]],
        kept: Kept,
        progress: Progress,
        batch_size: int,
        max_new_tokens: int,
    ) -> Bench:
        """Let the dense model answer all questions, those of like length in one batch."""
        loaded = subject.loaded
        parts: dict[str, list[Batch]] = {}
        pictures: dict[str, list[str]] = {}
        total = sum(-(-len(each) // batch_size) for each in questions.values())
        done = 0
        for part, asked in questions.items():
            ordered = sorted(asked, key=lambda question: loaded.length(question.prompt))
            pictures[part] = [question.picture for question in ordered]
            parts[part] = []
            for start in range(0, len(ordered), batch_size):
                prompts = [question.prompt for question in ordered[start : start + batch_size]]
                path = kept.answers(part, start)
                known = torch.tensor(read_json(path)["ids"]) if path.is_file() else None
                with fitting():
                    batch = answered(
                        subject.routable,
                        dict(loaded.encode(prompts)),
                        loaded.processor.tokenizer.pad_token_id,
                        max_new_tokens,
                        known,
                    )
                write_json(path, {"ids": batch.answer.tolist()})
                parts[part].append(batch)
                done += 1
                progress("dense answers", done, total)
        return cls(subject, kept, progress, parts, pictures)

    def outcome(self, part: str, ratios: Ratios, selection: Selection, label: str) -> Outcome:
        """Measure a variant on a part of the questions, unless that is known already."""
        key = sha256(json.dumps([part, list(ratios), selection.name]).encode()).hexdigest()[:24]
        if key not in self.kept.outcomes:
            found = measure(self.subject.routable, self.batches[part], ratios, selection)
            self.kept.add(key, found)
        self.made += 1
        self.progress(label, self.made, max(self.expected, self.made))
        return self.kept.outcomes[key]

    def divergence(self, part: str, ratios: Ratios, selection: Selection, label: str) -> float:
        """Mean KL divergence of a variant."""
        return float(self.outcome(part, ratios, selection, label).divergence.mean())

    def fit(self) -> dict[int, Fitted]:
        """Routers fitted to what text attends to in the dense model, by layer; those that explain something."""
        moments = {part: [Moments() for _ in range(self.subject.layers)] for part in ("fit", "choose")}
        done, total = 0, sum(len(self.batches[part]) for part in moments)
        for part, by_layer in moments.items():
            for batch in self.batches[part]:
                self._observe(batch, by_layer)
                done += 1
                self.progress("attention of text", done, total)
        fitted = {
            layer: fit(seen, unseen)
            for layer, (seen, unseen) in enumerate(zip(moments["fit"], moments["choose"], strict=True))
        }
        return {layer: router for layer, router in fitted.items() if router is not None}

    def _observe(self, batch: Batch, moments: Sequence[Moments]) -> None:
        """Add one batch's vision tokens, as each layer gets them, and the log of the attention that text pays them."""
        going_in: dict[int, Any] = {}

        def scores(layer: int, attention: torch.Tensor) -> None:
            moments[layer].add(going_in.pop(layer), (attention + FLOOR).log())

        routable = self.subject.routable
        with routable.dense() as model, observing(routable.decoder, going_in.__setitem__, scores):
            model(**batch.on(model), use_cache=False, logits_to_keep=1)

    def compare(self, part: str, values: np.ndarray, others: np.ndarray | float = 0.0) -> Difference:
        """Mean of the values less that of others of the same samples, with its 95 % interval.

        Pictures are drawn, not questions; there are at least two in every part.
        """
        zeros = np.zeros_like(values) + others
        return compare_means(self.pictures[part], values.tolist(), zeros.tolist())
