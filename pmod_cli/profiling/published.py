"""Figures that the p-MoD paper publishes (arXiv 2412.04449, main table), for its 7B models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pmod_cli.profiling.geometry import Geometry


@dataclass(frozen=True)
class Published:
    """TFLOPs (two a multiply-add) and share of KV cache, as printed.

    Attributes:
        model: The paper's name of the dense model.
        dense_tflops: Of the dense model.
        pmod_tflops: Of the p-MoD model.
        kv_retention: KV cache of p-MoD as a share of dense; the figure counts vision tokens.
        source: Where it stands.
    """

    model: str
    dense_tflops: float
    pmod_tflops: float
    kv_retention: float
    source: str = "p-MoD, arXiv 2412.04449"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


_BY_TYPE = {
    "llava": Published("LLaVA-v1.5-7B", 8.38, 4.92, 0.538),
    "llava_next": Published("LLaVA-NeXT-7B", 39.46, 21.94, 0.538),
}


def published_figures(geometry: Geometry) -> Published | None:
    """What the paper says of a model of this geometry; None if it says nothing."""
    decoder = geometry.decoder
    is_vicuna_7b = (decoder.hidden, decoder.layers, decoder.intermediate, geometry.original_vocab) == (
        4096,
        32,
        11008,
        32000,
    )
    return _BY_TYPE.get(geometry.model_type) if is_vicuna_7b else None


def published_family(model_type: str) -> Published | None:
    """What the paper says of its 7B model of a family.

    Args:
        model_type: Of the dense model, as transformers calls it.
    """
    return _BY_TYPE.get(model_type)
