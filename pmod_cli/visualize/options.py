"""The options of ``pmod visualize``. Imports nothing that is slow: ``pmod --help`` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VisualizeOptions:
    """What the user asks for; `pmod_cli.cli.visualize` has each option's help."""

    model: str
    image: Path
    prompt: str
    output: Path | None = None
    gif: Path | None = None
    html: Path | None = None
    layers: str | None = None
    baseline: str = "auto"
    max_new_tokens: int = 128
    dtype: str = "auto"
    device: str = "auto"
    force: bool = False
    as_json: bool = False
