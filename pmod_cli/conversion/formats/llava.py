"""Original LLaVA checkpoints (``liuhaotian/llava-*``), the paper's releases, which extend them, and their parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pmod_cli.checkpoints.load import ORIGINAL_DECODERS, is_released
from pmod_cli.checkpoints.shards import StoredTensor, encode
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats import llava_config, llava_weights
from pmod_cli.conversion.formats.llava_tokenizer import find_tokenizer
from pmod_cli.conversion.formats.llava_weights import EMBEDDING, HEAD, NEWLINE, PROJECTOR, TOWER
from pmod_cli.conversion.formats.translation import Options, Shard, Translation, shard_name
from pmod_cli.modeling.names import is_router
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError

_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_NO_TOKENIZER = (
    "no tokenizer was found: the new checkpoint has none, and its image token is the first id after the vocabulary; "
    "--tokenizer names one"
)


def translate_whole(source: Source, options: Options) -> Translation:
    """Translate a model of LLaVA's own code, or of the release: there the p-MoD settings are in its config."""
    options.refuse("projector")
    config, notes = source.config, []
    mod = llava_config.mod_config(config) if is_released(config) else None
    family = llava_config.family_name(config)
    files = llava_weights.read_weights(source, options.allow_pickle)
    names = {tensor.name for file in files for tensor in file}
    if mod is None and any(map(is_router, names)):
        raise PmodError(f"{source.name} has routers, and its config.json no p-MoD settings")
    if family == "llava" and NEWLINE in names:
        files = [[tensor for tensor in file if tensor.name != NEWLINE] for file in files]
        notes.append("image_newline is left out: LLaVA-1.5 does not use it")
    tower = llava_weights.find_tower(
        options.vision_tower or config.get("mm_vision_tower") or config.get("vision_tower"),
        inside=any(name.startswith(TOWER) for name in names),
        near=source.folder,
        allow_pickle=options.allow_pickle,
        chosen=options.vision_tower is not None,
    )
    decoder = ORIGINAL_DECODERS.get(source.model_type, "llama")
    return _assemble(source, options, decoder, config, [*files, list(tower.tensors)], tower, mod, notes)


def translate_parts(source: Source, options: Options) -> Translation:
    """Put a language model, a vision tower and the projector of LLaVA's first stage together, as the paper trains."""
    recipe = options.recipe
    named = recipe.source if recipe and isinstance(recipe.source, dict) else {}
    tower_name = options.vision_tower or named.get("vision_tower")
    projector_name = options.projector or named.get("projector")
    if not tower_name or not projector_name:
        raise PmodError(
            f"{source.name} is a language model alone",
            "--vision-tower (openai/clip-vit-large-patch14-336) and --projector (mm_projector.bin) name the rest",
        )
    tiled = recipe is not None and recipe.family == "llava_next"
    files = llava_weights.read_weights(source, options.allow_pickle)
    hidden = int(source.config["hidden_size"])
    projector = llava_weights.read_projector(projector_name, source.folder, options.allow_pickle)
    tower = llava_weights.find_tower(tower_name, inside=False, near=None, allow_pickle=options.allow_pickle)
    notes, extra = [], [*projector, *tower.tensors]
    if tiled:
        dtype = projector[0].dtype if projector[0].dtype in ("F16", "BF16") else "F32"
        numbers = np.random.default_rng(0).standard_normal(hidden) / np.sqrt(hidden)
        data = encode(numbers.astype(np.float32), dtype)
        extra.append(StoredTensor.from_bytes(NEWLINE, dtype, (hidden,), data))
        notes.append("image_newline starts with random numbers, as in LLaVA-NeXT's training")
    side = tower.config["image_size"]
    flat: dict[str, Any] = {
        **source.config,
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "anyres" if tiled else "pad",
        "mm_patch_merge_type": "spatial_unpad" if tiled else "flat",
        "image_grid_pinpoints": [[across * side, down * side] for across, down in llava_config.NEXT_GRIDS],
    }
    return _assemble(source, options, source.model_type, flat, [*files, extra], tower, None, notes)


def _assemble(
    source: Source,
    options: Options,
    decoder: str,
    flat: dict[str, Any],
    files: list[list[StoredTensor]],
    tower: llava_weights.Tower,
    mod: MoDConfig | None,
    notes: list[str],
) -> Translation:
    """Make a translation of weights that have transformers' names already, routers included, by file.

    ``decoder`` is the ``model_type`` of the language model, ``flat`` the config in LLaVA's terms.
    """
    tokenizer = find_tokenizer(source, options.tokenizer, decoder, flat.get("tokenizer_model_max_length"))
    tensors = [tensor for file in files for tensor in file]
    embedding = next((tensor for tensor in tensors if tensor.name == EMBEDDING), None)
    if embedding is None or len(embedding.shape) != 2:
        raise PmodError("the weights have no token embeddings (model.embed_tokens.weight)")
    image_token = tokenizer.image_token if tokenizer else embedding.shape[0]
    rows = llava_weights.rows_needed(embedding.shape[0], image_token)
    if tokenizer and tokenizer.pad_token is not None:
        flat = {**flat, "pad_token_id": tokenizer.pad_token}
    config = llava_config.dense_config(flat, decoder, tower.config, image_token, rows)
    _check_complete(config, embedding.shape[1], tensors)
    kept = []
    for file in files:
        weights = [tensor for tensor in file if not is_router(tensor.name)]
        if weights:
            tables = (EMBEDDING, HEAD)
            kept.append([llava_weights.with_mean_rows(t, rows) if t.name in tables else t for t in weights])
    aspect_ratio = flat.get("image_aspect_ratio")
    given = source.json("generation_config.json")
    return Translation(
        config=config,
        shards=[Shard(shard_name(number, len(kept)), file) for number, file in enumerate(kept, 1)],
        files={
            **{name: path for name, path in source.sidecars().items() if name in _LICENCES},
            **llava_config.processor_files(config, tower.images, aspect_ratio),
            "generation_config.json": llava_config.generation_file(config["text_config"], given),
            **(tokenizer.files if tokenizer else {}),
        },
        mod=mod,
        routers={tensor.name: tensor for tensor in tensors if is_router(tensor.name)},
        originals=llava_config.processor_files(config, tower.images, aspect_ratio, baseline=True),
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
        found = by_name[name].shape
        if found != shape:
            raise PmodError(f"{name} has shape {list(found)}, and its config says {list(shape)}")
