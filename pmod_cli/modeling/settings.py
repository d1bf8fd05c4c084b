"""What a p-MoD checkpoint's ``config.json`` says under ``mod``: self-describing, no schedule to re-derive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmod_cli.modeling.schedule import Ratios
from pmod_cli.modeling.weight_norm import WEIGHT_NORMS

TARGET_TOKENS = ("vision", "vision_hr", "all")
CHOICES = ("router", "random")
MOST_LAYERS = 1000
"""Of a decoder; no more can be meant."""


@dataclass(frozen=True)
class MoDConfig:
    """The Mixture-of-Depths part of a model's configuration.

    Attributes:
        retention_ratios: One entry per decoder layer: None for a dense layer, else the share of target tokens kept.
        weight_norm: Function f of the router's weight ``w = weight_bias + weight_scale * f(logit)``.
        weight_scale: See ``weight_norm``.
        weight_bias: See ``weight_norm``.
        router_bias: Whether the router's linear map has a bias.
        target_tokens: Which tokens are routed: ``vision``, ``vision_hr`` (high-resolution sub-images only) or ``all``.
        coverage: How strongly evenly spread tokens, other ones in every layer, are preferred: a number in units of the
            logit, or one per decoder layer. It takes part in the ranking alone, never in a weight
            (`pmod_cli.modeling.router.coverage_term`).
        choice: What chooses the tokens that are kept: ``router``; or ``random``, a control, whose routers only weight:
            every forward pass draws other tokens in every layer, as `torch.manual_seed` decides.
    """

    retention_ratios: Ratios
    weight_norm: str = "tanh"
    weight_scale: float = 0.2
    weight_bias: float = 1.0
    router_bias: bool = True
    target_tokens: str = "vision"
    coverage: float | Sequence[float] = 0.0
    choice: str = "router"

    def __post_init__(self) -> None:
        if not isinstance(self.retention_ratios, list | tuple):
            raise ValueError("retention_ratios is no list")
        if len(self.retention_ratios) > MOST_LAYERS:
            raise ValueError(f"retention_ratios has more than {MOST_LAYERS} layers")
        for ratio in self.retention_ratios:
            if ratio is not None and not (isinstance(ratio, int | float) and 0 <= ratio <= 1):
                raise ValueError(f"retention ratio {ratio!r} is outside [0, 1]")
        for name in ("weight_scale", "weight_bias"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not abs(value) < 1e6:
                raise ValueError(f"{name} is {value!r}, not a number that can be meant")
        for name in ("weight_norm", "target_tokens", "choice"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a name")
        if not isinstance(self.router_bias, bool):
            raise ValueError(f"router_bias is {self.router_bias!r}, not true or false")
        if self.weight_norm not in WEIGHT_NORMS:
            raise ValueError(f"unknown weight norm {self.weight_norm!r}; known: {', '.join(WEIGHT_NORMS)}")
        if self.target_tokens not in TARGET_TOKENS:
            raise ValueError(
                f"unknown target tokens {self.target_tokens!r}; known: {', '.join(TARGET_TOKENS)}"
            )
        if self.choice not in CHOICES:
            raise ValueError(f"unknown choice {self.choice!r}; known: {', '.join(CHOICES)}")
        if isinstance(self.coverage, list | tuple):
            given, layers = len(self.coverage), len(self.retention_ratios)
            if given != layers:
                raise ValueError(f"{given} coverage strengths for {layers} decoder layers")
        for strength in self.layer_coverage:
            if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
                raise ValueError(f"coverage {strength!r} is not a number of 0 or more")

    @property
    def layer_coverage(self) -> list[float]:
        """The strength of coverage in each decoder layer."""
        if isinstance(self.coverage, list | tuple):
            return list(self.coverage)
        return [self.coverage] * len(self.retention_ratios)  # type: ignore[list-item]

    @property
    def mod_layers(self) -> list[int]:
        """Indices of the Mixture-of-Depths layers."""
        return [layer for layer, ratio in enumerate(self.retention_ratios) if ratio is not None]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoDConfig:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: Unknown key or bad value.
        """
        unknown = set(data) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown key in the mod section of the config: {', '.join(sorted(unknown))}")
        return cls(**data)
