"""The options of ``pmod profile``. Imports nothing that is slow: ``pmod --help`` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmod_cli.devices import find_device
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.prompt import DTYPE_BYTES, Workload, default_image_size, image_tokens, parse_size

_KNOWN = {
    "convention": ("full", "paper"),
    "counter": ("auto", "fvcore", "formula"),
    "dtype": ("auto", *DTYPE_BYTES),
    "kernels": ("auto", "torch", "liger"),
    "cache": ("dynamic", "static"),
}

_MOST = 10**6
"""Samples, and tokens of each: more cannot be meant, and would overflow what counts them."""


@dataclass(frozen=True)
class ProfileOptions:
    """What the user asks for; `pmod_cli.cli.profile` has each option's help.

    Attributes:
        image_size: ``WIDTHxHEIGHT`` in pixels; None for the size with the most vision tokens.
        text_tokens: Text tokens per sample; None for 35, or the paper's 30 under its convention.
        counter: ``fvcore`` (checked against the formula), ``formula``, or ``auto`` (fvcore where it is installed).
        compare: Two files that ``--json`` wrote; nothing is profiled.

    Raises:
        PmodError: A value that is not known, or a number below 1 or beyond reason.
    """

    model: str | None = None
    recipe: str | None = None
    overrides: Sequence[str] | None = None
    baseline: str = "auto"
    image_size: str | None = None
    image: Path | None = None
    no_image: bool = False
    text_tokens: int | None = None
    new_tokens: int = 64
    batch: int = 1
    dtype: str = "auto"
    logits: Literal["all", "last"] = "all"
    counter: Literal["auto", "fvcore", "formula"] = "auto"
    convention: Literal["full", "paper"] = "full"
    latency: bool = False
    allow_pickle: bool = False
    device: str = "auto"
    repeats: int = 5
    kernels: Literal["auto", "torch", "liger"] = "auto"
    cache: Literal["dynamic", "static"] = "dynamic"
    sweep: Literal["ratio", "tokens", "batch"] | None = None
    schedules: bool = False
    compare: tuple[Path, Path] | None = None
    plot: Path | None = None
    force: bool = False
    markdown: bool = False
    as_json: bool = False
    max_flops_ratio: float | None = None
    max_kv_ratio: float | None = None
    max_prefill_ratio: float | None = None
    max_first_prefill_ratio: float | None = None
    max_decode_ratio: float | None = None
    max_operators_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise PmodError(f"unknown {name} {getattr(self, name)!r}", f"one of {', '.join(known)}")
        if min(self.batch, self.new_tokens, self.text_tokens or 1, self.repeats) < 1:
            raise PmodError("batch, text tokens, new tokens and repeats must be at least 1")
        if max(self.batch, self.new_tokens, self.text_tokens or 1) > _MOST:
            raise PmodError(f"batch, text tokens and new tokens may be at most {_MOST:,}")

    def workload(self, geometry: Geometry) -> Workload:
        """The prompt in a model's tokens.

        Raises:
            PmodError: The picture cannot be read, or has a size that the model cannot take.
        """
        size = None if self.no_image else self._image_size() or default_image_size(geometry)
        dtype = self.dtype
        if dtype == "auto":
            on_cpu = self.latency and find_device(self.device).type == "cpu"
            dtype = "float32" if on_cpu else "bfloat16"
        return Workload(
            image=image_tokens(geometry, size) if size else None,
            image_size=size,
            text_tokens=self.text_tokens or (30 if self.convention == "paper" else 35),
            new_tokens=self.new_tokens,
            batch=self.batch,
            dtype=dtype,
            all_logits=self.logits == "all",
        )

    def _image_size(self) -> tuple[int, int] | None:
        """(height, width) as asked for, or of the picture."""
        if self.image_size:
            return parse_size(self.image_size)
        if self.image is None:
            return None
        from pmod_cli.pictures import open_image  # slow to import

        width, height = open_image(self.image).size
        return height, width
