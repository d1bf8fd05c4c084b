"""Checkpoint formats: two functions for each, one line in `FORMATS`.

A format turns a checkpoint into transformers' own form and knows nothing of schedules, files to write or the command
line. It has

- ``matches(source: Source) -> bool``: whether a source is of this format, from its config and file names alone;
- ``translate(source: Source, options: Options) -> Translation``: the dense transformers checkpoint that it is.

No module imports torch or transformers at its top. Tensors are `StoredTensor`: a name, a dtype, a shape, and a way to
get the bytes; a rename is ``tensor.renamed(...)``, a change of data another ``chunks``. What ``translate`` returns is
streamed to disk shard by shard (`pmod_cli.checkpoints.write`), never held. Sources give theirs by
``source.weight_files(options.allow_pickle)``; a part beside a checkpoint, or on the hub, is opened by
``open_source(name, near=source.folder, allow_pickle=...)``, and a pickled file that is not a whole checkpoint
(``mm_projector.bin``) by `read_pickle`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pmod_cli.checkpoints.load import ORIGINAL_DECODERS, is_original, is_released
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats import huggingface, llava
from pmod_cli.conversion.formats.translation import Options, Shard, Translation
from pmod_cli.families import FAMILIES, find_family
from pmod_cli.output.errors import PmodError

__all__ = ["FORMATS", "Format", "Options", "Shard", "Translation", "find_format"]


class Format(NamedTuple):
    """How a format is recognised and read; see above."""

    matches: Callable[[Source], bool]
    translate: Callable[[Source, Options], Translation]


_FAMILY_TYPES = {kind for family in FAMILIES for kind in (family.base_type, family.model_type)}

FORMATS = {
    "released": Format(lambda source: is_released(source.config), llava.translate_whole),
    "original": Format(lambda source: is_original(source.config), llava.translate_whole),
    "huggingface": Format(lambda source: source.model_type in _FAMILY_TYPES, huggingface.translate),
    "parts": Format(lambda source: source.model_type in ORIGINAL_DECODERS.values(), llava.translate_parts),
}
"""By name, in the order in which they are asked."""


def find_format(source: Source, any_family: bool = False) -> str:
    """The name of the first format that a source matches; `PmodError` if there is none."""
    name = next((name for name, format in FORMATS.items() if format.matches(source)), None)
    if name is not None:
        return name
    if source.model_type:
        find_family(source.model_type, any_family)  # its error names the families that exist
        return "huggingface"
    raise PmodError(
        f"{source.name} is not a checkpoint of a known format",
        f"known formats: {', '.join(FORMATS)}" if source.config else "it has no config.json",
    )
