"""The options of ``pmod calibrate``. Imports nothing that is slow: ``pmod --help`` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmod_cli.output.errors import PmodError

LEAST_SAMPLES = 24
"""Fewer questions than this cannot be divided into three."""


@dataclass(frozen=True)
class CalibrateOptions:
    """What the user asks for; `pmod_cli.cli.calibrate` has each option's help."""

    model: str
    data: str
    output: Path
    images: Path | None = None
    samples: int = 128
    flops: float | None = None
    kv: float | None = None
    schedule: Literal["paper", "own"] | None = None
    min_agreement: float | None = None
    max_new_tokens: int = 16
    batch_size: int = 16
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    force: bool = False
    as_json: bool = False

    def check(self) -> None:
        """Refuse options that contradict each other or are out of range, as a `PmodError`."""
        given = [name for name in ("flops", "kv", "schedule") if getattr(self, name) is not None]
        if len(given) > 1:
            raise PmodError(f"--{given[0]} and --{given[1]} both say how much is kept", "give one of them")
        for name in ("flops", "kv"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise PmodError(f"--{name} {value:g} is not a share between 0 and 1", f"e.g. --{name} 0.6")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise PmodError(f"--min-agreement {self.min_agreement:g} is outside [0, 1]", "e.g. 0.95")
        if self.samples < LEAST_SAMPLES:
            raise PmodError(
                f"--samples {self.samples} are too few",
                f"at least {LEAST_SAMPLES}: they are divided in three",
            )

    @property
    def settings(self) -> dict[str, object]:
        """What the result depends on, apart from model and data."""
        names = (
            "samples",
            "flops",
            "kv",
            "schedule",
            "max_new_tokens",
            "batch_size",
            "seed",
            "dtype",
            "device",
        )
        return {name: getattr(self, name) for name in names}
