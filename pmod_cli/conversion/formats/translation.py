"""What a format makes of a source: the dense checkpoint that it is, in transformers' own form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What the user said about the source.

    Attributes:
        allow_pickle: Whether pickled weights may be loaded.
        vision_tower: Folder or hub id of the vision tower, where it is a part of its own.
        projector: File, folder or hub id of the projector, likewise.
        tokenizer: Folder or hub id of the tokenizer, where the source has none.
        any_family: Whether a family that is not listed may be tried.
        recipe: Its ``source`` can name the parts, and its family counts, where neither source nor user tells.
    """

    allow_pickle: bool = False
    vision_tower: str | None = None
    projector: str | None = None
    tokenizer: str | None = None
    any_family: bool = False
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Shard:
    """One file of weights.

    Attributes:
        name: Its file name in the new checkpoint.
        tensors: Its tensors, in transformers' names.
        linked: An existing safetensors file that is this shard already; it is linked, not written.
        original: Its name in the dense checkpoint, if another.
    """

    name: str
    tensors: Sequence[StoredTensor]
    linked: Path | None = None
    original: str | None = None


def shard_name(number: int, count: int) -> str:
    """Transformers' name of one of several weight files, from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class Translation:
    """A source as a dense transformers checkpoint.

    Attributes:
        config: Contents of the dense ``config.json``: ``model_type`` is a family's ``base_type``.
        shards: All its weights, routers not included.
        files: Every other file to put beside them, by name: a path to copy or the bytes themselves. ``config.json``
            and the index are not among them.
        mod: Retention ratios and router settings, if the source is p-MoD already; a recipe is then refused.
        routers: Router tensors that the source has, by name, in the same names as the shards'.
        originals: Files that ``--to baseline`` gives back and that are others in the p-MoD checkpoint, by name: those
            of the source that were replaced (``config.json``, the index, the model card), or for a format that
            rewrites the weights those that the dense checkpoint needs differently (config and index excepted).
        notes: What the user should know of this translation, a sentence each.
    """

    config: dict[str, Any]
    shards: Sequence[Shard]
    files: dict[str, Path | bytes]
    mod: MoDConfig | None = None
    routers: dict[str, StoredTensor] = field(default_factory=dict)
    originals: dict[str, Path | bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()
