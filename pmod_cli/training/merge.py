"""A finished LoRA run, or another adapter of PEFT's, merged into its base."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pmod_cli.checkpoints.adapter import open_adapter
from pmod_cli.checkpoints.load import ADAPTER_CONFIG, loading, read_config
from pmod_cli.checkpoints.write import check_destination, check_space
from pmod_cli.extras import require
from pmod_cli.families import find_family
from pmod_cli.families.agreement import agree
from pmod_cli.families.processing import load_processor
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import PmodError, told_as
from pmod_cli.output.files import replacing
from pmod_cli.recipe import load_recipe
from pmod_cli.training.trainer import writing


def merge_adapter(
    source: Path, destination: Path, *, force: bool = False, allow_pickle: bool = False
) -> dict[str, Any]:
    """Write the checkpoint that an adapter and its base make together; the base is loaded into memory.

    ``force`` replaces a checkpoint that is there, ``allow_pickle`` reads an adapter's ``.bin`` weights.

    Returns:
        What ``docs/json.md`` lists for ``pmod convert --json``, but ``pushed_to``.

    Raises:
        PmodError: The source is no adapter, its base is not there or another model, or the destination cannot be
            written.
    """
    started = time.perf_counter()
    adapter = open_adapter(source, allow_pickle)
    base = adapter.base
    check_destination(destination, source, force, [base])
    require("peft")
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    try:
        dtype = _dtype(source, base)
        loaded = VisionLanguageModel.load(base, dtype=dtype, device="cpu", kernels="torch")
    except PmodError as error:
        raise PmodError(
            f"the adapter's base: {error.message}",
            f"base_model_name_or_path in {source / ADAPTER_CONFIG} says where it is",
        ) from error
    processor = loaded.processor
    if any((source / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        with loading(source, "cannot load the processor of"):
            processor = load_processor(source)  # as it was trained: aspect, chat template
        if grids := getattr(processor.image_processor, "image_grid_pinpoints", None):
            loaded.model.config.image_grid_pinpoints = grids
        agree(loaded.model.config, processor)
    if absent := {*adapter.modules} - {name for name, _ in loaded.model.named_modules()}:
        raise PmodError(
            f"{source} does not fit {base}: {len(absent)} layers are not there, e.g. {min(absent)}"
        )
    # PEFT raises whatever the shapes and names of another model lead it into.
    with told_as(f"{source} does not fit {base}"):
        config = PeftConfig.from_peft_type(**adapter.config)
        wrapped: Any = PeftModel.from_pretrained(loaded.model, source, config=config)
        # PEFT's own guess whether embeddings are saved along asks the hub.
        sides = [
            get_peft_model_state_dict(wrapped, save_embedding_layers=along).keys() ^ adapter.tensors.keys()
            for along in (False, True)
        ]
        names = [name for name in min(sides, key=len) if ".base_layer." not in name]
    if names:
        raise PmodError(
            f"{source} does not fit {base}: {len(names)} tensors are on one side alone, e.g. {min(names)}"
        )
    with told_as(f"{source} cannot be merged"):
        model = wrapped.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_space(destination, size)
    room = "make room there, or choose another place"
    with writing(f"cannot write {destination}", room), replacing(destination, force=force) as folder:
        folder.mkdir()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    mod = getattr(model.config, "mod", None)
    return {
        "source": str(source),
        "destination": str(destination),
        "format": "peft",
        "family": find_family(model.config.model_type).name,
        "recipe": None,
        "layers": [],
        "mean_retention": None,
        "router_parameters": sum(p.numel() for name, p in model.named_parameters() if is_router(name)),
        "weight_bytes": size,
        "to": "merged",
        "methods": {"written": len(list(destination.glob("*.safetensors")))},
        "notes": [f"merged into {base}, {'p-MoD' if mod else 'dense'}"],
        "seconds": time.perf_counter() - started,
    }


def _dtype(source: Path, base: str) -> str:
    """What the run's recipe says, as with ``pmod finetune --merge``; else the base's."""
    if (source / "recipe.yaml").is_file():
        return load_recipe(str(source / "recipe.yaml")).train.dtype
    return str(read_config(base).dtype or torch.float32).removeprefix("torch.")
