"""The models: 7B geometries (or tiny ones), random weights, a p-MoD model and its dense twin on the same tensors."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)

from pmod_cli.families.tiles import TiledVision
from pmod_cli.modeling.decoders import PmodLlamaModel
from pmod_cli.modeling.family import family_classes
from pmod_cli.modeling.model import MoDMultimodalModel
from pmod_cli.modeling.names import is_router
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.modeling.twin import dense_twin
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.geometry import Geometry, find_geometry
from pmod_cli.profiling.latency import make_inputs
from pmod_cli.profiling.prompt import Workload, default_image_size, image_tokens
from pmod_cli.recipe import ModSettings

FAMILIES = {
    # The families' own modules name image processors, which need Pillow.
    "llava-1.5-7b": (LlavaConfig, LlavaModel, LlavaForConditionalGeneration, MoDMultimodalModel),
    "llava-next-7b": (LlavaNextConfig, LlavaNextModel, LlavaNextForConditionalGeneration, TiledVision),
}
LLAVA, NEXT = FAMILIES
TEXT_TOKENS = 35
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TINY_TEXT = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 4, "vocab_size": 64}
TINY_TOWER = {**SIZES, "num_hidden_layers": 2, "image_size": 56}
TINY = {"image_token_index": 63, "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}


@dataclass
class Pair:
    """A p-MoD model and its dense twin.

    Attributes:
        name: Of the geometry.
        pmod: The p-MoD model; its routers are random.
        dense: The dense model.
        mod: The paper's settings.
        geometry: For counting.
        texts: By batch, the first text length of which neither prompt nor decode steps were run.
    """

    name: str
    pmod: Any
    dense: Any
    mod: MoDConfig
    geometry: Geometry
    texts: dict[int, int] = field(default_factory=dict)

    def work(self, batch: int, text: int = TEXT_TOKENS) -> Workload:
        """One image and so many text tokens per sample."""
        size = default_image_size(self.geometry)
        image = image_tokens(self.geometry, size)
        return Workload(image, size, text_tokens=text, batch=batch, all_logits=False)

    def inputs(self, batch: int, text: int = TEXT_TOKENS) -> dict[str, Tensor]:
        """The same, ready for either model."""
        return make_inputs(self.pmod, self.work(batch, text))

    def new_text(self, batch: int, span: int = 1) -> int:
        """A text length such that neither it nor the ``span - 1`` after it were run with this batch."""
        text = self.texts.get(batch, TEXT_TOKENS + 1)
        self.texts[batch] = text + span
        return text

    def flops_ratio(self, batch: int) -> float:
        """Prefill FLOPs of p-MoD over dense."""
        work = self.work(batch)
        counts = [closed_form.prefill(self.geometry, mod, work).macs for mod in (self.mod, None)]
        return counts[0] / counts[1]


def make_pair(name: str, device: torch.device, tiny: bool) -> Pair:
    """Both models on the device, in bf16.

    Args:
        name: `LLAVA` or `NEXT`.
        device: Where to.
        tiny: Whether to shrink the geometry until a CPU runs it in milliseconds.
    """
    raw = (find_geometry(name) or {})["config"]
    if tiny:
        raw |= {key: value for key, value in TINY.items() if key in raw}
        raw |= {
            "text_config": raw["text_config"] | TINY_TEXT,
            "vision_config": raw["vision_config"] | TINY_TOWER,
        }
    base_config, inner, outer, vision = FAMILIES[name]
    classes = family_classes(__name__, base_config, inner, outer, (PmodLlamaModel,), vision)
    mod = MoDConfig(ModSettings().retention_ratios(raw["text_config"]["num_hidden_layers"]))
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    AutoModelForImageTextToText.register(classes.config, classes.outer, exist_ok=True)
    torch.manual_seed(0)
    with torch.device(device):
        pmod = AutoModelForImageTextToText.from_config(
            classes.config(**settings, mod=mod.to_dict()), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    for key, parameter in pmod.named_parameters():
        if is_router(key):
            torch.nn.init.normal_(parameter, std=0.02)
    dense = dense_twin(pmod, base_config(**settings), "bfloat16")
    for model in (pmod, dense):
        model.model.vision_tower.requires_grad_(False)
    return Pair(name, pmod, dense, mod, Geometry.from_config(raw))


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        cold_tokens: Decode steps after each prompt of a new length.
        decode_tokens: Decode steps where they are timed by themselves.
        new_tokens: Of each ``generate``.
        repeats: Rounds that count.
        batches: Three batches, from one sample to many.
        growing: Batches until a model is out of memory.
    """

    cold_tokens: int = 32
    decode_tokens: int = 16
    new_tokens: int = 48
    repeats: int = 5
    batches: tuple[int, int, int] = (1, 8, 32)
    growing: tuple[int, ...] = (16, 64, 96, 128, 144, 192, 256, 320, 384, 512)


TINY_SIZES = Sizes(cold_tokens=2, decode_tokens=2, new_tokens=3, repeats=1, batches=(1, 2, 3), growing=(1, 2))


class Session:
    """The pairs of one run, each made when it is first asked for.

    Attributes:
        device: Where everything runs.
        tiny: Whether the models are tiny.
        sizes: How much is measured.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.sizes = TINY_SIZES if tiny else Sizes()
        self._pairs: dict[str, Pair] = {}

    def pair(self, name: str) -> Pair:
        """A geometry's models."""
        if name not in self._pairs:
            self._pairs[name] = make_pair(name, self.device, self.tiny)
        return self._pairs[name]

    def release(self, name: str) -> None:
        """Free a pair's memory, if it was made."""
        self._pairs.pop(name, None)
        free_memory()


def free_memory() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
