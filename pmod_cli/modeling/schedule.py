"""Retention schedules: the share of vision tokens that each decoder layer keeps.

A schedule is a list with one entry per layer: ``None`` for a dense layer (no router), else the retention ratio
R in [0, 1] of a Mixture-of-Depths layer. Progressive ratio decay (PRD): p-MoD, arXiv 2412.04449, section 3.3.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

Ratios = list[float | None]


def shifted_cosine(
    num_layers: int, *, shift: float = 0.5, ceiling: float = 0.85, floor: float = 0.15
) -> Ratios:
    """``R_l = cos(pi * l / (L - 1)) / 2 + shift``, dense above ``ceiling``, never below ``floor``.

    The released code writes 31 for ``L - 1``; at 32 layers the two agree.

    Args:
        num_layers: Number of decoder layers L, at least 2.
        shift: Height of the curve's middle (``mod_router_factor`` in the release).
        ceiling: Layers with a ratio above this stay dense.
        floor: Smallest ratio.

    Returns:
        One ratio (or None) per layer.

    Raises:
        ValueError: If there are fewer than 2 layers.
    """
    return _decay(num_layers, lambda x: math.cos(math.pi * x) / 2 + shift, ceiling, floor)


def shifted_linear(
    num_layers: int, *, shift: float = 0.5, ceiling: float = 0.85, floor: float = 0.15
) -> Ratios:
    """``R_l = 0.5 - l / (L - 1) + shift``, cut at ``ceiling`` and ``floor`` like `shifted_cosine`."""
    return _decay(num_layers, lambda x: 0.5 - x + shift, ceiling, floor)


def constant(
    num_layers: int, *, ratio: float = 0.5, first_layer: int = 2, last_layer: int | None = None
) -> Ratios:
    """The same ratio in layers ``first_layer`` to ``last_layer`` (by default L - 2: the last stays dense).

    The release calls this ``deep_all``, and with ``last_layer = L - 1`` ``deep_all_include_last``. A negative
    ``last_layer`` counts from the end, as an index does.
    """
    _check_layers(num_layers)
    if last_layer is not None and not -num_layers <= last_layer < num_layers:
        raise ValueError(f"there is no layer {last_layer} among {num_layers}")
    last = num_layers - 2 if last_layer is None else last_layer % num_layers
    return [ratio if first_layer <= layer <= last else None for layer in range(num_layers)]


def interleaved(num_layers: int, *, ratio: float = 0.5) -> Ratios:
    """The same ratio in every odd layer; the even ones stay dense (``interleave`` in the release)."""
    _check_layers(num_layers)
    return [ratio if layer % 2 else None for layer in range(num_layers)]


def explicit(num_layers: int, *, ratios: Sequence[float | None]) -> Ratios:
    """A list given by the user, one entry per layer.

    Raises:
        ValueError: If its length is not the number of layers.
    """
    _check_layers(num_layers)
    if len(ratios) != num_layers:
        raise ValueError(f"{len(ratios)} retention ratios for {num_layers} decoder layers")
    return list(ratios)


SCHEDULES: dict[str, Callable[..., Ratios]] = {
    "shifted_cosine": shifted_cosine,
    "shifted_linear": shifted_linear,
    "constant": constant,
    "interleaved": interleaved,
    "explicit": explicit,
}


def kept_tokens(num_tokens: int, ratio: float) -> int:
    """Number of vision tokens that a layer keeps: ``trunc(num_tokens * ratio)``, multiplied in fp32.

    The fp32 product is what the released code computes; it differs from a double's only where the product
    falls within fp32 rounding of an integer.
    """
    # The double product of two fp32 numbers is exact, so rounding it once gives the fp32 product.
    return int(ctypes.c_float(num_tokens * ctypes.c_float(ratio).value).value)


def mean_retention(ratios: Sequence[float | None]) -> float:
    """Mean share of vision tokens over the layers, a dense layer counting 1."""
    return sum(1.0 if ratio is None else ratio for ratio in ratios) / len(ratios)


def _decay(num_layers: int, curve: Callable[[float], float], ceiling: float, floor: float) -> Ratios:
    _check_layers(num_layers)
    raw = [curve(layer / (num_layers - 1)) for layer in range(num_layers)]
    return [None if ratio > ceiling else max(ratio, floor) for ratio in raw]


def _check_layers(num_layers: int) -> None:
    if num_layers < 2:
        raise ValueError(f"a retention schedule needs at least 2 decoder layers, not {num_layers}")
