"""Local question-and-answer data as a task in lmms-eval's own YAML."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from pmod_cli.output.files import write_file
from pmod_cli.output.marks import TAG

_TEMPLATE = Path(__file__).parent / "_short_answer_yaml"


def write_task(folder: str | Path, name: str, dataset: str | Path, kinds: Iterable[str] = ()) -> Path:
    """Write the YAML of a task over a local data set, to be found with ``--include-path FOLDER``.

    The data set has a split ``test`` with the columns ``image``, ``question``, ``answer`` and, if there are kinds,
    ``kind``. Its score is the share of answers that match exactly, letter case and a final full stop aside; each
    kind's share is a metric of its own.

    Args:
        folder: Where to write it.
        name: Name of the task.
        dataset: What ``datasets.load_dataset`` takes: a folder with parquet files.
        kinds: The kinds of question.

    Returns:
        The file.
    """
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("exact_match", *kinds)
    ]
    config = {
        "include": str(_TEMPLATE),
        "task": name,
        "dataset_path": str(Path(dataset).resolve()),
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    path = Path(folder) / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, f"# {TAG}\n{yaml.safe_dump(config, sort_keys=False)}")
    return path
