"""A model whose every decoder layer can run dense or routed, at any ratio, on the weights of one loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pmod_cli.modeling import twin
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.modeling.router import Router
from pmod_cli.modeling.settings import MoDConfig

Ratios = Sequence[float | None]
Rank = Callable[[RoutingPlan], None]
"""Changes the tie-break of a forward pass, ``plan.rank``: how controls choose tokens."""


@dataclass
class Routable:
    """The model, and what its layers do now.

    Attributes:
        model: A p-MoD model with a router in every layer.
        mod: Settings that all variants share: weight norm, target tokens ...
    """

    model: Any
    mod: MoDConfig

    @classmethod
    def of(cls, model: Any, config: Any) -> Routable:
        """Of a loaded model, dense or p-MoD, whose tensors are shared.

        Args:
            model: The loaded model.
            config: Config of its p-MoD class, with a ratio for every layer.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(twin.routed_twin(model, config, dtype), config.mod_config)

    @property
    def decoder(self) -> Any:
        """The p-MoD language model."""
        return self.model.get_decoder()

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.decoder.layers)

    @property
    def routers(self) -> list[Router]:
        """Of every layer."""
        return [layer.router for layer in self.decoder.layers]

    @contextmanager
    def routed(
        self, ratios: Ratios, coverage: Sequence[float] | float = 0.0, rank: Rank | None = None
    ) -> Iterator[Any]:
        """The model with these retention ratios while the block runs, None for a dense layer."""
        decoder = self.decoder
        for layer, ratio in zip(decoder.layers, ratios, strict=True):
            layer.retention_ratio = ratio
        decoder.mod = replace(self.mod, coverage=coverage)

        def change(_: Any, args: Any, kwargs: Any) -> None:
            plan = kwargs.get("routing_plan")
            if plan is not None and plan.target_mask is not None and rank is not None:
                rank(plan)

        handle = decoder.register_forward_pre_hook(change, with_kwargs=True)
        try:
            with torch.inference_mode():
                yield self.model
        finally:
            handle.remove()
            decoder.mod = self.mod
            for layer in decoder.layers:
                layer.retention_ratio = None

    def dense(self) -> Any:
        """The model with all layers dense while the block runs."""
        return self.routed([None] * self.layers)
