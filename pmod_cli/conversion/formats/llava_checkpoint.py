"""What the original LLaVA format and the released p-MoD format have in common: one checkpoint, translated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.conversion.formats import Options, Shard, Translation
from pmod_cli.conversion.formats.llava_config import dense_config, family_name
from pmod_cli.conversion.formats.llava_files import generation_file, processor_files
from pmod_cli.conversion.formats.llava_keys import is_buffer, parse_key
from pmod_cli.conversion.formats.llava_rows import rows_needed, with_mean_rows
from pmod_cli.conversion.formats.llava_tokenizer import TokenizerFiles, build_tokenizer, find_tokenizer
from pmod_cli.conversion.formats.llava_tower import PREFIX, check_tower, find_tower
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NEWLINE = "model.image_newline"
PROJECTOR = tuple(
    f"model.multi_modal_projector.linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")
)
NO_TOKENIZER = (
    "no tokenizer was found: the new checkpoint has none, and its image token is the first id after the vocabulary; "
    "--tokenizer names one"
)


@dataclass
class Weights:
    """Weights of a checkpoint in transformers' names, file by file.

    Attributes:
        files: The tensors of each file.
        routers: Router tensors by layer and part.
    """

    files: list[list[StoredTensor]]
    routers: dict[int, dict[str, StoredTensor]] = field(default_factory=dict)

    def find(self, name: str) -> StoredTensor | None:
        """A tensor by name."""
        return next((tensor for file in self.files for tensor in file if tensor.name == name), None)

    def without(self, name: str) -> Weights:
        """The same without one tensor."""
        return Weights(
            [[tensor for tensor in file if tensor.name != name] for file in self.files], self.routers
        )

    def all(self) -> list[StoredTensor]:
        """Every tensor but the routers."""
        return [tensor for file in self.files for tensor in file]


def read_weights(source: Source, allow_pickle: bool) -> Weights:
    """The weights of a checkpoint in the original or the released format.

    Raises:
        PmodError: A name that these formats do not have, or see `Source.weight_files`.
    """
    weights = Weights([])
    for file in source.weight_files(allow_pickle):
        tensors = []
        for stored in file.tensors.values():
            if is_buffer(stored.name):
                continue
            key = parse_key(stored.name)
            if key is None:
                raise PmodError(f"{file.name} has {stored.name}, which is not a parameter of this format")
            if key.layer is not None:
                weights.routers.setdefault(key.layer, {})[key.part] = stored
            elif key.name is not None:
                tensors.append(stored.renamed(key.name))
        weights.files.append(tensors)
    return weights


def translate_llava(
    source: Source, options: Options, decoder: str, mod: MoDConfig | None = None
) -> Translation:
    """Translate a checkpoint in the original or the released format.

    Args:
        source: The checkpoint.
        options: What the user said.
        decoder: ``model_type`` of its language model.
        mod: Its settings, if it is p-MoD.

    Raises:
        PmodError: A part is missing, does not fit, or is not supported.
    """
    notes: list[str] = []
    family = family_name(source.config)
    weights = read_weights(source, options.allow_pickle)
    if mod is None and weights.routers:
        raise PmodError(
            f"{source.name} has routers, and its config.json no p-MoD settings", "--format released?"
        )
    if family == "llava" and weights.find(NEWLINE):
        weights = weights.without(NEWLINE)
        notes.append("image_newline is left out: LLaVA-1.5 does not use it")
    tower = find_tower(
        options.vision_tower or source.config.get("mm_vision_tower") or source.config.get("vision_tower"),
        inside=any(tensor.name.startswith(PREFIX) for tensor in weights.all()),
        near=source.folder,
        allow_pickle=options.allow_pickle,
        chosen=options.vision_tower is not None,
    )
    if tower.tensors:
        weights.files.append(list(tower.tensors))
    tokenizer, found = tokenizer_for(
        source, options, decoder, source.config.get("tokenizer_model_max_length")
    )
    notes += found
    config, weights = with_image_token(weights, source.config, decoder, tower.config, tokenizer)
    check_complete(config, weights.all())
    aspect = source.config.get("image_aspect_ratio")
    return Translation(
        config=config,
        shards=shards_of(weights),
        files=sidecar_files(config, tower.images, aspect, tokenizer, source),
        mod=mod,
        routers=weights.routers,
        originals=processor_files(config, tower.images, aspect, baseline=True),
        notes=notes,
    )


def tokenizer_for(
    source: Source, options: Options, decoder: str, max_length: int | None
) -> tuple[TokenizerFiles | None, list[str]]:
    """The tokenizer that the user names or the source has, and what to tell the user if there is none.

    Raises:
        PmodError: The user's has no tokenizer, or one that cannot be read.
    """
    if options.tokenizer:
        chosen = find_tokenizer(open_source(options.tokenizer, near=source.folder))
        if chosen is None:
            raise PmodError(f"{options.tokenizer} has no tokenizer", "tokenizer.json or tokenizer.model")
        return build_tokenizer(chosen, decoder, max_length), []
    own = find_tokenizer(source)
    return (build_tokenizer(own, decoder, max_length), []) if own else (None, [NO_TOKENIZER])


def with_image_token(
    weights: Weights,
    flat: dict[str, Any],
    decoder: str,
    vision: dict[str, Any],
    tokenizer: TokenizerFiles | None,
) -> tuple[dict[str, Any], Weights]:
    """The dense config, and weights in which the image token has a row.

    Raises:
        PmodError: No embedding table, or see `dense_config`.
    """
    embedding = weights.find(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise PmodError("the weights have no token embeddings (model.embed_tokens.weight)")
    image_token = tokenizer.image_token if tokenizer else embedding.shape[0]
    rows = rows_needed(embedding.shape[0], image_token)
    files = [
        [with_mean_rows(tensor, rows) if tensor.name in (EMBEDDING, HEAD) else tensor for tensor in file]
        for file in weights.files
    ]
    if tokenizer and tokenizer.pad_token is not None:
        flat = {**flat, "pad_token_id": tokenizer.pad_token}
    return dense_config(flat, decoder, vision, image_token, rows), Weights(files, weights.routers)


def check_complete(config: dict[str, Any], tensors: Iterable[StoredTensor]) -> None:
    """Check that nothing is missing beside the decoder layers, which conversion looks at itself.

    Raises:
        PmodError: The first tensor that is missing or has another shape.
    """
    tensors = list(tensors)
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PmodError(f"the weights have {twice} twice")
    needed = [EMBEDDING, "model.language_model.norm.weight", *PROJECTOR]
    if not config["tie_word_embeddings"]:
        needed.append(HEAD)
    if config["model_type"] == "llava_next":
        needed.append(NEWLINE)
    for name in needed:
        if name not in names:
            raise PmodError(f"the weights lack {name} (in transformers' terms)")
    check_tower(config["vision_config"], tensors)


def shards_of(weights: Weights) -> list[Shard]:
    """One output shard for each file that has weights left."""
    files = [file for file in weights.files if file]
    return [
        Shard(f"model-{number:05d}-of-{len(files):05d}.safetensors", file)
        for number, file in enumerate(files, 1)
    ]


def sidecar_files(
    config: dict[str, Any],
    images: dict[str, Any] | None,
    aspect_ratio: str | None,
    tokenizer: TokenizerFiles | None,
    *sources: Source,
) -> dict[str, Path | bytes]:
    """Everything beside the weights and ``config.json``.

    Args:
        config: The dense config.
        images: ``preprocessor_config.json`` of the vision tower, or None.
        aspect_ratio: ``image_aspect_ratio``.
        tokenizer: The tokenizer, or None.
        sources: Where to look for the ids of special tokens and for licences.
    """
    generation = [source.json("generation_config.json") for source in sources]
    licences: Sequence[str] = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
    return {
        **{name: path for source in sources for name, path in source.sidecars().items() if name in licences},
        **processor_files(config, images, aspect_ratio),
        "generation_config.json": generation_file(config["text_config"], *generation),
        **(tokenizer.files if tokenizer else {}),
    }
