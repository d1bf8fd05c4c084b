"""Routers in closed form: ridge regression from a layer's input to the log of the attention that text pays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6
"""Added to the attention before its logarithm."""

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties that are tried, for inputs of variance 1."""


class Moments:
    """Sums over tokens that a ridge regression needs; tokens themselves are not kept.

    Inputs are taken relative to the first batch's mean, so that fp32 sums stay exact enough.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add tokens: inputs [tokens, hidden], targets [tokens]."""
        x, y = inputs.float(), targets.float()
        if not self.count:
            self.shift, self.level = x.mean(0), y.mean()
            self.x, self.y = torch.zeros_like(x[0]), torch.zeros_like(y[0])
            self.xx, self.xy, self.yy = (
                torch.zeros_like(x.mT @ x),
                torch.zeros_like(x[0]),
                torch.zeros_like(y[0]),
            )
        x, y = x - self.shift, y - self.level
        self.count += len(y)
        self.x += x.sum(0)
        self.y += y.sum()
        self.xx += x.mT @ x
        self.xy += x.mT @ y
        self.yy += y @ y

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of inputs and targets; covariances of inputs, of both, and of targets."""
        x, y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(x, x)
        return (
            x + self.shift,
            y + self.level,
            covariance,
            self.xy / self.count - x * y,
            self.yy / self.count - y * y,
        )


@dataclass(frozen=True)
class Fitted:
    """A layer's fitted router.

    Attributes:
        weight: fp32 [hidden], such that the logit has mean 0 and standard deviation 1 over the tokens.
        bias: fp32, one number.
        explained: Share of the target's variance that it explains on tokens that it was not fitted to.
        penalty: The ridge penalty that explained most.
    """

    weight: Tensor
    bias: Tensor
    explained: float
    penalty: float


def fit(seen: Moments, unseen: Moments) -> Fitted | None:
    """Fit a router; the penalty is the one that explains most of other tokens.

    Args:
        seen: Tokens to fit to.
        unseen: Others.

    Returns:
        The router; None if it explains nothing.
    """
    mean, level, covariance, joint, _ = (each.double() for each in seen.centred())
    other_mean, other_level, other_covariance, other_joint, other_variance = (
        each.double() for each in unseen.centred()
    )
    scale = covariance.diagonal().clamp(min=0).sqrt() + 1e-6
    gram = covariance / torch.outer(scale, scale)
    best: Fitted | None = None
    for penalty in PENALTIES:
        ridge = gram + penalty * torch.eye(len(scale), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(ridge, joint / scale) / scale
        offset = (other_mean - mean) @ weight - (other_level - level)
        error = other_variance - 2 * weight @ other_joint + weight @ other_covariance @ weight + offset**2
        explained = float(1 - error / other_variance)
        deviation = (weight @ covariance @ weight).sqrt()
        if explained > max(0.0, best.explained if best else 0.0) and deviation > 0:
            weight = weight / deviation
            best = Fitted(weight.float(), -(mean @ weight).float(), explained, penalty)
    return best
