"""Checkpoint formats: one module a format, one word in `FORMATS`.

The seam. A module of this package turns a checkpoint of its format into transformers' own form and knows nothing of
schedules, files to write or the command line. It has

- ``SUMMARY``: a few words for ``--help`` and messages;
- ``matches(source: Source) -> bool``: whether a source is of this format, from its config and file names alone;
- ``translate(source: Source, options: Options) -> Translation``: what the dense transformers checkpoint is.

No module imports torch or transformers at its top. Tensors are `StoredTensor`: a name, a dtype, a shape, and a way to
get the bytes; a rename is ``tensor.renamed(...)``, a change of data another ``chunks``. What ``translate`` returns is
streamed to disk shard by shard (`pmod_cli.checkpoints.write`), never held. Sources give theirs by
``source.weight_files(options.allow_pickle)``; a part beside a checkpoint, or on the hub, is opened by
``open_source(name, near=source.folder, allow_pickle=...)``, and a pickled file that is not a whole checkpoint
(``mm_projector.bin``) by `read_pickle`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.checkpoints.source import Source
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError

FORMATS = ("released", "original", "huggingface", "parts")
"""Modules of this package, in the order in which they are asked."""


@dataclass(frozen=True)
class Options:
    """What the user said about the source.

    Attributes:
        allow_pickle: Whether pickled weights may be loaded.
        vision_tower: Folder or hub id of the vision tower, where it is a part of its own.
        projector: File, folder or hub id of the projector, likewise.
        tokenizer: Folder or hub id of the tokenizer, where the source has none.
        parts: What the recipe's ``source`` names (``vision_tower``, ``projector``), where the user names nothing.
        family: The family the recipe is for, where the source does not tell; None if there is no recipe.
    """

    allow_pickle: bool = False
    vision_tower: str | None = None
    projector: str | None = None
    tokenizer: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None


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


@dataclass(frozen=True)
class Translation:
    """A source as a dense transformers checkpoint.

    Attributes:
        config: Contents of the dense ``config.json``: ``model_type`` is a family's ``base_type``.
        shards: All its weights, routers not included.
        files: Every other file to put beside them, by name: a path to copy or the bytes themselves. ``config.json``
            and the index are not among them.
        mod: Retention ratios and router settings, if the source is p-MoD already; a recipe is then refused.
        routers: Router tensors that the source has, by layer: ``{"weight": ..., "bias": ...}``, any name.
        originals: Files that ``--to baseline`` gives back and that are others in the p-MoD checkpoint, by name: those
            of the source that were replaced (``config.json``, the index, the model card), or for a format that
            rewrites the weights those that the dense checkpoint needs differently (config and index excepted).
        notes: What the user should know of this translation, a sentence each.
    """

    config: dict[str, Any]
    shards: Sequence[Shard]
    files: dict[str, Path | bytes]
    mod: MoDConfig | None = None
    routers: dict[int, dict[str, StoredTensor]] = field(default_factory=dict)
    originals: dict[str, Path | bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Format(Protocol):
    """What a module of this package has."""

    SUMMARY: str

    def matches(self, source: Source) -> bool:
        """Whether a source is of this format."""

    def translate(self, source: Source, options: Options) -> Translation:
        """The dense transformers checkpoint that a source is."""


def find_format(source: Source, name: str | None = None) -> tuple[str, Format]:
    """The format of a source: the one that is named, or the first that matches.

    Raises:
        PmodError: Unknown name, or no format matches.
    """
    if name is not None:
        if name not in FORMATS:
            raise PmodError(f"unknown format {name!r}", f"known: {', '.join(FORMATS)}")
        return name, _module(name)
    for known in FORMATS:
        module = _module(known)
        if module.matches(source):
            return known, module
    from pmod_cli.families import find_family

    if source.model_type:
        find_family(source.model_type)  # its error names the families that exist
    raise PmodError(
        f"{source.name} is not a checkpoint of a known format",
        "it has no config.json" if not source.config else f"known formats: {', '.join(FORMATS)}",
    )


def _module(name: str) -> Format:
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))
