"""The original LLaVA format (``liuhaotian/llava-*``) and the paper's released p-MoD format, which extends it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pmod_cli.checkpoints.load import ORIGINAL_DECODERS
from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats.llava_config import (
    dense_config,
    family_name,
    generation_file,
    mod_config,
    processor_files,
)
from pmod_cli.conversion.formats.llava_tokenizer import find_tokenizer
from pmod_cli.conversion.formats.llava_weights import (
    EMBEDDING,
    HEAD,
    NEWLINE,
    PROJECTOR,
    TOWER,
    Tower,
    find_tower,
    read_weights,
    rows_needed,
    with_mean_rows,
)
from pmod_cli.conversion.formats.translation import Options, Shard, Translation
from pmod_cli.modeling.names import is_router
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError

_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_NO_TOKENIZER = (
    "no tokenizer was found: the new checkpoint has none, and its image token is the first id after the vocabulary; "
    "--tokenizer names one"
)


def translate_released(source: Source, options: Options) -> Translation:
    """Translate a released p-MoD model: retention ratios, weight norm and target tokens are in its config."""
    return translate_original(source, options, mod_config(source.config))


def translate_original(source: Source, options: Options, mod: MoDConfig | None = None) -> Translation:
    """Translate a model of LLaVA's own code: a dense one, or with p-MoD settings."""
    config, notes = source.config, []
    family = family_name(config)
    files = read_weights(source, options.allow_pickle)
    names = {tensor.name for file in files for tensor in file}
    if mod is None and any(map(is_router, names)):
        raise PmodError(
            f"{source.name} has routers, and its config.json no p-MoD settings", "--format released?"
        )
    if family == "llava" and NEWLINE in names:
        files = [[tensor for tensor in file if tensor.name != NEWLINE] for file in files]
        notes.append("image_newline is left out: LLaVA-1.5 does not use it")
    tower = find_tower(
        options.vision_tower or config.get("mm_vision_tower") or config.get("vision_tower"),
        inside=any(name.startswith(TOWER) for name in names),
        near=source.folder,
        allow_pickle=options.allow_pickle,
        chosen=options.vision_tower is not None,
    )
    decoder = ORIGINAL_DECODERS.get(source.model_type, "llama")
    return assemble(source, options, decoder, config, [*files, list(tower.tensors)], tower, mod, notes)


def assemble(
    source: Source,
    options: Options,
    decoder: str,
    flat: dict[str, Any],
    files: list[list[StoredTensor]],
    tower: Tower,
    mod: MoDConfig | None,
    notes: list[str],
) -> Translation:
    """Make a translation of weights that have transformers' names already.

    Args:
        source: The checkpoint; special tokens and licences are taken from it.
        options: What the user said.
        decoder: ``model_type`` of its language model.
        flat: The config in LLaVA's terms.
        files: All tensors, routers included, by file.
        tower: The vision tower.
        mod: Settings, if the source is p-MoD.
        notes: What the user should know so far.

    Raises:
        PmodError: A part is missing or does not fit.
    """
    tokenizer = find_tokenizer(source, options.tokenizer, decoder, flat.get("tokenizer_model_max_length"))
    tensors = [tensor for file in files for tensor in file]
    embedding = next((tensor for tensor in tensors if tensor.name == EMBEDDING), None)
    if embedding is None or len(embedding.shape) != 2:
        raise PmodError("the weights have no token embeddings (model.embed_tokens.weight)")
    image_token = tokenizer.image_token if tokenizer else embedding.shape[0]
    rows = rows_needed(embedding.shape[0], image_token)
    if tokenizer and tokenizer.pad_token is not None:
        flat = {**flat, "pad_token_id": tokenizer.pad_token}
    config = dense_config(flat, decoder, tower.config, image_token, rows)
    _check_complete(config, embedding.shape[1], tensors)
    kept = []
    for file in files:
        weights = [tensor for tensor in file if not is_router(tensor.name)]
        if weights:
            tables = (EMBEDDING, HEAD)
            kept.append([with_mean_rows(t, rows) if t.name in tables else t for t in weights])
    aspect_ratio = flat.get("image_aspect_ratio")
    given = source.json("generation_config.json")
    return Translation(
        config=config,
        shards=[
            Shard(f"model-{number:05d}-of-{len(kept):05d}.safetensors", file)
            for number, file in enumerate(kept, 1)
        ],
        files={
            **{name: path for name, path in source.sidecars().items() if name in _LICENCES},
            **processor_files(config, tower.images, aspect_ratio),
            "generation_config.json": generation_file(config["text_config"], given),
            **(tokenizer.files if tokenizer else {}),
        },
        mod=mod,
        routers={tensor.name: tensor for tensor in tensors if is_router(tensor.name)},
        originals=processor_files(config, tower.images, aspect_ratio, baseline=True),
        notes=notes if tokenizer else [*notes, _NO_TOKENIZER],
    )


def _check_complete(config: dict[str, Any], hidden: int, tensors: Iterable[StoredTensor]) -> None:
    """Refuse weights that lack something outside the decoder layers, which conversion checks itself."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    by_name: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if by_name.setdefault(tensor.name, tensor) is not tensor:
            raise PmodError(f"the weights have {tensor.name} twice")
    vision = config["vision_config"]
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**vision))
    sides = ((hidden, vision["hidden_size"]), (hidden,), (hidden, hidden), (hidden,))
    needed: dict[str, tuple[int, ...]] = {
        **{
            TOWER + name.removeprefix("vision_model."): tuple(parameter.shape)
            for name, parameter in tower.named_parameters()
        },
        "model.language_model.norm.weight": (hidden,),
        **dict(zip(PROJECTOR, sides, strict=True)),
        **({} if config["tie_word_embeddings"] else {HEAD: by_name[EMBEDDING].shape}),
        **({NEWLINE: (hidden,)} if config["model_type"] == "llava_next" else {}),
    }
    for name, shape in needed.items():
        if name not in by_name:
            raise PmodError(f"the weights lack {name} (in transformers' terms)")
        if by_name[name].shape != shape:
            raise PmodError(
                f"{name} has shape {list(by_name[name].shape)}, and its config says {list(shape)}"
            )
