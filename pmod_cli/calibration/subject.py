"""The checkpoint that is calibrated: the loaded model, which runs dense or routed, and what schedules cost it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Any

import torch
from transformers import AutoConfig

from pmod_cli.calibration.questions import Question
from pmod_cli.calibration.routable import Routable
from pmod_cli.calibration.selection import Selection
from pmod_cli.conversion.calibrated import CheckpointBase
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.prompt import Workload, image_tokens


@dataclass(frozen=True)
class Subject:
    """The model.

    Attributes:
        loaded: As it was loaded, with its processor.
        routable: The same weights, every layer with a router.
        own: The selection that the checkpoint brings; None for a dense one and for new routers.
        ratios: The retention ratios that it brings; None for a dense one.
    """

    loaded: VisionLanguageModel
    routable: Routable
    own: Selection | None
    ratios: list[float | None] | None

    @classmethod
    def load(cls, base: CheckpointBase, dtype: str, device: str) -> Subject:
        """Load a checkpoint, dense or p-MoD; a `PmodError` if it cannot be."""
        loaded = VisionLanguageModel.load(base.folder, dtype=dtype, device=device)
        config = loaded.model.config
        brought: MoDConfig | None = getattr(config, "mod_config", None)
        layers = config.text_config.num_hidden_layers
        mod = replace(
            brought or MoDConfig([]), retention_ratios=[1.0] * layers, coverage=0.0, choice="router"
        )
        data = config.to_dict() | {"mod": mod.to_dict()}
        data.pop("model_type")
        routed = AutoConfig.for_model(base.family.model_type, **data)
        own = None if brought is None else _own(loaded.model, brought)
        ratios = None if brought is None else list(brought.retention_ratios)
        return cls(loaded, Routable.of(loaded.model, routed), own, ratios)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.routable.layers


def _own(model: Any, mod: MoDConfig) -> Selection | None:
    """What a p-MoD model chooses by; None while its routers are new, and choose as the shifted spread does."""
    routers = {index: model.get_decoder().layers[index].router for index in mod.mod_layers}
    tensors = {
        index: (router.weight.detach(), None if router.bias is None else router.bias.detach())
        for index, router in routers.items()
    }
    if not any(bool(weight.any()) for weight, _ in tensors.values()):
        return None
    return Selection("its own routers", tensors, mod.layer_coverage)


@dataclass(frozen=True)
class Costs:
    """What a schedule costs as a share of the dense model, by the formulas of ``pmod profile``.

    Attributes:
        geometry: The model's sizes.
        work: One picture of the questions' median size and their median text.
        target_tokens: See `MoDConfig`.
    """

    geometry: Geometry
    work: Workload
    target_tokens: str

    @classmethod
    def of(cls, base: CheckpointBase, subject: Subject, questions: Sequence[Question]) -> Costs:
        """For such questions; a `PmodError` if the model is of a kind that cannot be counted."""
        geometry = Geometry.from_config(base.dense_config)
        sizes = sorted(question.prompt.images[0].size for question in questions)
        width, height = sizes[len(sizes) // 2]
        tokens = image_tokens(geometry, (height, width))
        text = median_low(subject.loaded.length(question.prompt) for question in questions) - tokens.tokens
        dtype = str(subject.loaded.model.dtype).removeprefix("torch.")
        work = Workload(tokens, (height, width), max(text, 1), dtype=dtype, all_logits=False)
        return cls(geometry, work, subject.routable.mod.target_tokens)

    def _mod(self, ratios: Sequence[float | None]) -> MoDConfig:
        return MoDConfig(list(ratios), target_tokens=self.target_tokens)

    def flops(self, ratios: Sequence[float | None]) -> float:
        """Prefill FLOPs, of the dense model's."""
        dense, routed = (
            closed_form.prefill(self.geometry, mod, self.work).macs for mod in (None, self._mod(ratios))
        )
        return routed / dense

    def kv(self, ratios: Sequence[float | None]) -> float:
        """KV cache after the prefill, of the dense model's."""
        dense, routed = (
            sum(closed_form.kv_bytes(self.geometry, mod, self.work)) for mod in (None, self._mod(ratios))
        )
        return routed / dense


def stored(selection: Selection, dtype: str) -> Selection:
    """The selection as the checkpoint will hold it: routers rounded to its number format."""
    kind = getattr(torch, dtype)
    routers = {
        layer: (weight.to(kind).float(), None if bias is None else bias.to(kind).float())
        for layer, (weight, bias) in selection.routers.items()
    }
    return replace(selection, routers=routers)
