"""How to evaluate, as the user says it. Imports nothing that is slow: ``pmod --help`` reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pmod_cli.devices import check_dtype, find_device
from pmod_cli.output.errors import PmodError

Progress = Callable[[str, int, int], None]
"""Called with role and task, as in ``model: gqa``, how many of its samples are answered, and how many there are."""


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate; all that both models share.

    ``limit`` takes only the first so many documents of a task or, below 1, that share of them. ``max_new_tokens`` is an
    upper limit on the tasks' own. From ``dtype`` on see `VisionLanguageModel.load`.
    """

    batch_size: int | str = "auto"
    limit: float | None = None
    max_new_tokens: int | None = None
    dtype: str = "auto"
    device: str | None = None
    image_backend: str = "pil"
    attn_implementation: str | None = None
    kernels: Literal["auto", "torch", "liger"] = "auto"
    cache: Literal["dynamic", "static"] = "dynamic"

    def check(self) -> None:
        """Refuse what cannot be meant, with a `PmodError` that names the option."""
        from pmod_cli.evaluation.batching import parse_batch_size

        try:
            parse_batch_size(self.batch_size)
        except ValueError:
            raise PmodError(f"--batch-size {self.batch_size}: give a positive number or auto") from None
        document_limit("", self.limit, 1)
        check_dtype(self.dtype)
        find_device(self.device)


@dataclass(frozen=True)
class EvalOptions(EvalSettings):
    """All options of ``pmod eval``; `pmod_cli.cli.eval` has each option's help."""

    batch_size: str = "auto"
    model: str | None = None
    tasks: str = ""
    baseline: str | None = None
    output: Path | None = None
    include_path: list[Path] | None = None
    minimum: list[str] | None = None
    max_drop: float | None = None
    offline: bool = False
    prepare: bool = False
    diff: tuple[Path, Path] | None = None
    force: bool = False
    as_json: bool = False

    def settings(self) -> EvalSettings:
        """Those that say how to evaluate."""
        return EvalSettings(**{field.name: getattr(self, field.name) for field in fields(EvalSettings)})


def document_limit(task: str, limit: float | None, total: int) -> int | None:
    """How many of a task's documents to take, or None for all; below 1, ``limit`` is a share of them.

    MME counts questions in pairs that stand one after the other, so its limit is rounded up to an even number. A limit
    that is not positive, or neither a share nor whole, is a `PmodError`.
    """
    if limit is None:
        return None
    if not 0 < limit < math.inf or (limit >= 1 and limit != int(limit)):
        raise PmodError(f"--limit {limit:g}: give a whole number, or a share between 0 and 1")
    count = math.ceil(total * limit) if limit < 1 else int(limit)
    if task == "mme":
        count += count % 2
    return count if count < total else None
