"""Weight norms: the function f in the router's weight ``w = weight_bias + weight_scale * f(logit)``.

TanhNorm is the paper's (p-MoD, arXiv 2412.04449, section 3.1); the others are in its release too. A norm takes fp32
logits [batch, tokens] and the mask of routed tokens [batch, tokens], and returns values [batch, tokens]; those of
tokens that are not routed are not used. It has to rise with the logit, since tokens are ranked by logit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # recipes are checked against these names without torch
    from torch import Tensor

FP32_MIN = -3.4028234663852886e38


def tanh(logits: Tensor, target_mask: Tensor) -> Tensor:
    """Between -1 and 1; 0 for a router of zeros."""
    return logits.tanh()


def sigmoid(logits: Tensor, target_mask: Tensor) -> Tensor:
    """Between 0 and 1."""
    return logits.sigmoid()


def softmax(logits: Tensor, target_mask: Tensor) -> Tensor:
    """Over a sample's routed tokens; sums to 1."""
    # A sample without routed tokens would be a row of -inf, whose softmax is NaN in the gradient too.
    return logits.masked_fill(~target_mask, FP32_MIN).softmax(-1)


def none(logits: Tensor, target_mask: Tensor) -> Tensor:
    """The logit itself."""
    return logits


WEIGHT_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": tanh,
    "sigmoid": sigmoid,
    "softmax": softmax,
    "none": none,
}
