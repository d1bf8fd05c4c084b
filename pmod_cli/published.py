"""What the p-MoD paper publishes about its 7B models (arXiv 2412.04449v2).

Both tables are by family: the ``model_type`` of the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """TFLOPs (two per multiply-add) and p-MoD's share of the dense model's KV cache (of vision tokens), as printed."""

    model: str
    dense_tflops: float
    pmod_tflops: float
    kv_retention: float
    source: str = "p-MoD, arXiv 2412.04449"


COSTS = {
    "llava": Published("LLaVA-v1.5-7B", 8.38, 4.92, 0.538),
    "llava_next": Published("LLaVA-NeXT-7B", 39.46, 21.94, 0.538),
}

COLUMNS = (
    ("SEED", "RWQA", "MME", "MMB", "POPE", "GQA", "AI2D"),
    ("DocVQA", "ChartQA", "TextVQA", "InfoVQA", "OK-VQA", "MMMU", "SQA"),
)
"""Of tables 1 and 2."""


def _row(*values: float) -> dict[str, float]:
    return dict(zip(COLUMNS[0] + COLUMNS[1], values, strict=True))


SCORES: dict[str, dict[str, dict[str, float]]] = {
    "llava": {
        "baseline": _row(
            66.2, 55.6, 1506.8, 64.1, 85.9, 61.9, 55.2, 28.1, 18.2, 46.0, 25.8, 53.4, 36.6, 69.7
        ),
        "model": _row(66.5, 55.7, 1482.8, 65.4, 85.5, 62.2, 56.2, 27.6, 16.8, 44.8, 26.8, 56.0, 36.3, 69.3),
    },
    "llava_next": {
        "baseline": _row(
            68.9, 57.6, 1519.3, 67.5, 87.2, 63.5, 64.0, 70.1, 61.6, 62.7, 34.7, 54.0, 35.3, 69.7
        ),
        "model": _row(69.0, 57.6, 1495.5, 67.3, 86.8, 63.3, 65.1, 70.0, 61.8, 60.5, 34.1, 55.1, 36.0, 71.0),
    },
}
"""Scores by column, of the dense baseline and of the p-MoD model."""
