"""transformers' own format (``llava-hf/*`` and whatever ``save_pretrained`` wrote): nothing is rewritten.

Older checkpoints name their parameters differently (``language_model.model.*``); transformers renames them while
loading, for our model types as for its own, so the names in the files stay.
"""

from __future__ import annotations

from pathlib import Path

from pmod_cli.checkpoints.shards import INDEX, SINGLE
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats.translation import Options, Shard, Translation, shard_name
from pmod_cli.families import find_family
from pmod_cli.output.errors import PmodError

_REPLACED = ("config.json", "README.md")


def translate(source: Source, options: Options) -> Translation:
    """Link the weights as they are; pickled ones are rewritten as safetensors. What is p-MoD already is refused."""
    if find_family(source.model_type, options.any_family).model_type == source.model_type:
        raise PmodError(f"{source.name} is p-MoD already", "--to baseline gives its baseline back")
    files, sidecars = source.weight_files(options.allow_pickle), source.sidecars()
    safe = all(file.safe for file in files)
    originals: dict[str, Path | bytes] = {}
    if safe:
        originals = {name: sidecars[name] for name in _REPLACED if name in sidecars}
        if (source.folder / INDEX).is_file():
            originals[INDEX] = source.folder / INDEX
    shards = []
    for number, file in enumerate(files, 1):
        name, tensors = shard_name(number, len(files)), list(file.tensors.values())
        if not file.safe:
            shards.append(Shard(name, tensors))
            continue
        # transformers reads a file called model.safetensors alone and would not look at the index.
        name = name if file.name == SINGLE else file.name
        shards.append(Shard(name, tensors, linked=file.path.resolve(), original=file.name))
    return Translation(
        config=source.config,
        shards=shards,
        files={name: path for name, path in sidecars.items() if name not in _REPLACED},
        originals=originals,
    )
