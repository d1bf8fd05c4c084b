"""Which published figures belong to a geometry."""

from __future__ import annotations

from pmod_cli.profiling.geometry import Geometry
from pmod_cli.published import COSTS, Published


def published_figures(geometry: Geometry) -> Published | None:
    """What the paper says about a model of this geometry; None if it says nothing."""
    decoder = geometry.decoder
    shape = (decoder.hidden, decoder.layers, decoder.intermediate, geometry.original_vocab)
    is_vicuna_7b = shape == (4096, 32, 11008, 32000)
    return COSTS.get(geometry.model_type) if is_vicuna_7b else None
