"""A few rows for each of the paper's tasks, put in place of the hub data sets.

The YAML files include lmms-eval's own and replace the data source only: prompts, answer parsing, metrics and
aggregation are the real ones. Each question carries a marker, by which a test's model finds it in the key.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import datasets
import lmms_eval.tasks
import yaml

from tests.common.eval_models import noise

BUILTIN = Path(lmms_eval.tasks.__file__).parent
MARKER = re.compile(r"\bQ(\d{4})\b")


class Fixtures:
    """Writes the data and the YAML of all 14 tasks.

    Attributes:
        include: Folder for ``--include-path``.
        right: The right answer by marker.
        wrong: A wrong one, of the form that the task asks for.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.include = folder / "yaml"
        self.include.mkdir(parents=True)
        self.right: dict[int, str] = {}
        self.wrong: dict[int, str] = {}
        self._rng = random.Random(seed)
        for write in (
            self._vqa,
            self._scienceqa,
            self._mme,
            self._seedbench,
            self._pope,
            self._realworldqa,
            self._gqa,
            self._ai2d,
            self._chartqa,
            self._documents,
            self._mmbench,
            self._mmmu,
        ):
            write()
        for group in ("ok_vqa/_ok_vqa.yaml", "pope/pope_full.yaml"):
            (self.include / Path(group).name).write_text((BUILTIN / group).read_text())

    def _mark(self, question: str, right: str, wrong: str) -> str:
        number = len(self.right)
        self.right[number], self.wrong[number] = right, wrong
        return f"Q{number:04d} {question}"

    def _picture(self):
        return noise(self._rng)

    def _write(
        self, yaml_file: str, split: str, rows: list[dict], images: str | list[str] = "image", **changes
    ):
        name = Path(yaml_file).stem
        path = self.folder / f"{name}.parquet"
        data = datasets.Dataset.from_list(rows)
        for column in [images] if isinstance(images, str) else images:
            listed = isinstance(rows[0][column], list)
            data = data.cast_column(column, datasets.List(datasets.Image()) if listed else datasets.Image())
        data.to_parquet(path)
        config = {
            "include": str(BUILTIN / yaml_file),
            "task": name,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path)}},
            **changes,
        }
        (self.include / f"{name}.yaml").write_text(yaml.safe_dump(config))

    def _vqa(self):
        def rows():
            return [
                {
                    "image": self._picture(),
                    "question": self._mark("what is written there?", word, "nothing"),
                    "answers": [word] * 8 + ["something", "else"],
                    "question_id": index,
                    "ocr_tokens": [],
                }
                for index, word in enumerate(("alpha", "beta", "two words", "7"))
            ]

        self._write("ok_vqa/ok_vqa_val2014.yaml", "val2014", rows())
        self._write("textvqa/textvqa_val.yaml", "validation", rows())

    def _scienceqa(self):
        rows = [
            {
                "image": self._picture(),
                "question": self._mark("which is it?", right, wrong),
                "choices": ["heat", "light", "sound"],
                "answer": answer,
                "hint": hint,
            }
            for answer, hint, right, wrong in (
                (0, "", "A", "B"),
                (2, "a hint", "C", "A"),
                (1, "", "B. light", "C"),
            )
        ]
        self._write("scienceqa/scienceqa_img.yaml", "test", rows)

    def _mme(self):
        rows = []
        for category in ("existence", "count", "OCR", "code_reasoning", "text_translation"):
            for pair in range(2):
                for answer, other in (("Yes", "No"), ("No", "Yes")):
                    question = self._mark("is it there? Please answer yes or no.", answer, other)
                    rows.append(
                        {
                            "image": self._picture(),
                            "question": question,
                            "answer": answer,
                            "category": category,
                            "question_id": f"{category}/{pair}.png",
                        }
                    )
        self._write("mme/mme.yaml", "test", rows)

    def _seedbench(self):
        rows = [
            {
                "image": [self._picture() for _ in range(3 if kind == "video" else 1)],
                "question": self._mark("what is going on?", answer, "D" if answer != "D" else "A"),
                **{f"choice_{letter}": f"option {letter}" for letter in "abcd"},
                "answer": answer,
                "data_type": kind,
                "question_id": str(index),
            }
            for index, (answer, kind) in enumerate(
                (("A", "image"), ("C", "image"), ("D", "image"), ("B", "video"), ("B", "image"))
            )
        ]
        self._write("seedbench/seedbench.yaml", "test", rows)

    def _pope(self):
        for part, split in (("adv", "adversarial"), ("pop", "popular"), ("random", "random")):
            rows = [
                {
                    "image": self._picture(),
                    "question": self._mark("is there a cat in the image?", answer.capitalize(), other),
                    "answer": answer,
                    "question_id": str(index),
                }
                for index, (answer, other) in enumerate((("yes", "no"), ("no", "yes")) * 2)
            ]
            self._write(f"pope/pope_{part}.yaml", split, rows)

    def _realworldqa(self):
        choices = "\nA. left\nB. right\nC. straight"
        rows = [
            {
                "image": self._picture(),
                "question": self._mark(f"where to?{extra}", right, wrong),
                "answer": answer,
            }
            for answer, right, wrong, extra in (
                ("A", "A", "B", choices),
                ("C", "C. straight", "A", choices),
                ("4", "4", "5", ""),
                ("Downhill", "downhill.", "uphill", ""),
            )
        ]
        self._write("realworldqa/realworldqa.yaml", "test", rows)

    def _gqa(self):
        rows = [
            {
                "image": self._picture(),
                "question": self._mark("what colour is it?", right, "no colour"),
                "answer": answer,
                "imageId": str(index),
                "id": str(index),
            }
            for index, (answer, right) in enumerate((("red", "Red."), ("blue", "blue"), ("white", "White")))
        ]
        # The hub's pictures are a data set of their own, which this function joins.
        self._write("gqa/gqa.yaml", "testdev", rows, process_docs=None)

    def _ai2d(self):
        rows = [
            {
                "image": self._picture(),
                "question": self._mark("which part is this?", right, wrong),
                "options": ["leaf", "root", "stem", "bud"],
                "answer": str(answer),
            }
            for answer, right, wrong in ((0, "A", "C"), (1, "B. root", "A"), (3, "D", "D and B"))
        ]
        self._write("ai2d/ai2d.yaml", "test", rows)

    def _chartqa(self):
        rows = [
            {
                "image": self._picture(),
                "question": self._mark("how much?", right, wrong),
                "answer": answer,
                "type": kind,
            }
            for answer, right, wrong, kind in (
                ("10", "10.4", "10.6", "human_test"),
                ("Canada", "canada", "Chile", "augmented_test"),
                ("25", "24", "2.5", "augmented_test"),
            )
        ]
        self._write("chartqa/chartqa.yaml", "test", rows)

    def _documents(self):
        for file in ("docvqa/docvqa_val.yaml", "infovqa/infovqa_val.yaml"):
            rows = [
                {
                    "image": self._picture(),
                    "question": self._mark("what is the total?", answers[0], "zyxwvutsrq"),
                    "answers": answers,
                    "questionId": str(index),
                }
                for index, answers in enumerate((["12 dollars", "$12"], ["March 1973"], ["ACME"]))
            ]
            self._write(file, "validation", rows)

    def _mmbench(self):
        rows = []
        for question, category in ((3, "colour"), (8, "shape")):
            options = ["red", "green", "blue", "black"]
            for shift in range(4):
                letter = "ABCD"[(1 + shift) % 4]
                turned = options[-shift:] + options[:-shift]
                # One wrong shift is enough to lose a question: the wrong answers are right in the first three.
                rows.append(
                    {
                        "image": self._picture(),
                        "question": self._mark(
                            "which one?", f"{letter}.", letter if shift < 3 else "B. not it"
                        ),
                        "hint": "nan",
                        **dict(zip("ABCD", turned, strict=True)),
                        "answer": letter,
                        "category": category,
                        "L2-category": "perception",
                        "index": question + 1_000_000 * shift,
                        "source": "test",
                        "split": "dev",
                    }
                )
                assert turned["ABCD".index(letter)] == "green"
        self._write("mmbench/mmbench_en_dev_static.yaml", "dev", rows)
        self._write("mmbench/mmbench_en_dev.yaml", "dev", rows)

    def _mmmu(self):
        rows = []
        for index, (subject, kind, options, answer, right, wrong) in enumerate(
            (
                ("Art", "multiple-choice", "['oil', 'ink', 'wax']", "B", "B", "C"),
                ("Math", "multiple-choice", "['1', '2']", "A", "(A)", "(B)"),
                ("Physics", "open", "[]", "42", "42", "17"),
            )
        ):
            pictures = {f"image_{n}": None for n in range(1, 8)}
            pictures["image_1"] = self._picture()
            text = self._mark("look at <image 1>: which?", right, wrong)
            if index == 1:
                pictures["image_2"] = self._picture()
                text += " and <image 2>"
            rows.append(
                {
                    "id": f"validation_{subject}_{index + 1}",
                    "question": text,
                    "question_type": kind,
                    "options": options,
                    "answer": answer,
                    **pictures,
                }
            )
        self._write("mmmu/mmmu_val.yaml", "validation", rows, images=[f"image_{n}" for n in range(1, 8)])
