"""transformers' own format (``llava-hf/*`` and whatever ``save_pretrained`` wrote): nothing is rewritten.

Older checkpoints name their parameters differently (``language_model.model.*``); transformers renames them while
loading, for our model types as for its own, so the names in the files stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmod_cli.checkpoints.shards import INDEX, SINGLE, WeightFile
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats.translation import Options, Shard, Translation
from pmod_cli.families import FAMILIES
from pmod_cli.output.errors import PmodError

_REPLACED = ("config.json", "README.md")


def matches(source: Source) -> bool:
    """Whether ``model_type`` is that of a family, dense or p-MoD."""
    return any(source.model_type in (family.base_type, family.model_type) for family in FAMILIES)


def translate(source: Source, options: Options) -> Translation:
    """Link the weights as they are; pickled ones are rewritten as safetensors. What is p-MoD already is refused."""
    if any(source.model_type == family.model_type for family in FAMILIES):
        raise PmodError(
            f"{source.name} is p-MoD already",
            "--to baseline gives its dense baseline back; pmod inspect shows it",
        )
    files, sidecars = source.weight_files(options.allow_pickle), source.sidecars()
    safe = all(file.safe for file in files)
    originals: dict[str, Path | bytes] = {}
    if safe:
        originals = {name: sidecars[name] for name in _REPLACED if name in sidecars}
        if (source.folder / INDEX).is_file():
            originals[INDEX] = source.folder / INDEX
    return Translation(
        config=source.config,
        shards=[_shard(file, name) for file, name in zip(files, _names(files, safe), strict=True)],
        files={name: path for name, path in sidecars.items() if name not in _REPLACED},
        originals=originals,
    )


def _names(files: Sequence[WeightFile], safe: bool) -> list[str]:
    if safe and [file.name for file in files] != [SINGLE]:
        return [file.name for file in files]
    # transformers reads a file called model.safetensors alone and would not look at the index.
    return [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]


def _shard(file: WeightFile, name: str) -> Shard:
    tensors = list(file.tensors.values())
    if not file.safe:
        return Shard(name, tensors)
    return Shard(name, tensors, linked=file.path.resolve(), original=file.name)
