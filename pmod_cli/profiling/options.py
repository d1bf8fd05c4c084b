"""The options of ``pmod profile``. Imports nothing that is slow: ``pmod --help`` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ProfileOptions:
    """What the user asks for; `pmod_cli.cli.profile` has each option's help.

    Attributes:
        image_size: ``WIDTHxHEIGHT`` in pixels.
        dtype: ``auto``, or one of `pmod_cli.profiling.prompt.DTYPE_BYTES`.
        compare: Two files that ``--json`` wrote; nothing is profiled.
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
    device: str = "auto"
    repeats: int = 5
    layers: bool = False
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
