"""The demo's data on disk: LLaVA JSON with PNGs for training, a `datasets` folder for evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pmod_cli.demo import world
from pmod_cli.output.files import replacing

TRAIN_SEED = 1
HELDOUT_SEED = 2


@dataclass(frozen=True)
class HeldoutQuestion:
    """One held-out question with the picture to answer it from."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    question_id: str


def write_training_data(folder: Path, n_images: int, seed: int = TRAIN_SEED) -> tuple[Path, Path]:
    """Write conversations in the LLaVA format: one question of each kind about each picture, in a random order.

    Returns:
        ``train.json`` and the folder ``images`` in the folder, which is replaced.
    """
    rng = random.Random(seed)
    with replacing_folder(folder) as temporary:
        images = temporary / "images"
        images.mkdir()
        records: list[dict[str, Any]] = []
        for index in range(n_images):
            scene = world.draw_scene(rng, "train")
            name = f"{index:05d}.png"
            world.render(scene).save(images / name)
            turns: list[dict[str, str]] = []
            for question in world.ask_each(rng, scene):
                text = question.text if turns else f"<image>\n{question.text}"
                turns += {"from": "human", "value": text}, {"from": "gpt", "value": question.answer}
            records.append({"id": f"train-{index:05d}", "image": name, "conversations": turns})
        (temporary / "train.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return folder / "train.json", folder / "images"


def heldout_samples(
    n_images: int, seed: int = HELDOUT_SEED, *, shuffle: bool = False
) -> list[HeldoutQuestion]:
    """Draw held-out pictures and ask one question of each kind about each.

    Args:
        n_images: How many pictures; `shuffle` needs at least two.
        seed: Seed of the pictures and the questions.
        shuffle: Show each question with another picture than its own. A model that still answers better than
            by guessing does not look at the picture. Questions and answers stay the same.
    """
    if shuffle and n_images < 2:
        raise ValueError(f"shuffling needs two images at least, not {n_images}")
    rng = random.Random(seed)
    scenes = [world.draw_scene(rng, "heldout") for _ in range(n_images)]
    asked = [world.ask_each(rng, scene) for scene in scenes]
    shown = list(range(n_images))
    if shuffle:  # one cycle through all pictures: none keeps its place
        order = random.Random(seed).sample(shown, n_images)
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            shown[here] = there
    pictures = [world.render(scene) for scene in scenes]
    return [
        HeldoutQuestion(pictures[shown[index]], each.text, each.answer, each.kind, f"{index:04d}-{each.kind}")
        for index, questions in enumerate(asked)
        for each in questions
    ]


def write_heldout(folder: Path, n_images: int, seed: int = HELDOUT_SEED, shuffle: bool = False) -> Path:
    """Write held-out questions so that `datasets.load_dataset(str(folder))` opens them as the split `test`.

    Arguments are those of `heldout_samples`; what is already in the folder is replaced.

    Returns:
        The folder. Columns: `image`, `question`, `answer`, `kind`, `question_id`.
    """
    from datasets import Dataset

    rows = [vars(sample) for sample in heldout_samples(n_images, seed, shuffle=shuffle)]
    with replacing_folder(folder) as temporary:
        parquet = temporary / "data" / "test-00000-of-00001.parquet"
        parquet.parent.mkdir()
        Dataset.from_list(rows).to_parquet(parquet)
    return folder


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` once the block has ended without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as partial:
        partial.mkdir()
        yield partial
