"""A finished LoRA run, or another adapter of PEFT's, merged into its base."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pmod_cli.checkpoints.load import ADAPTER_CONFIG, read_config
from pmod_cli.checkpoints.write import check_destination, check_space
from pmod_cli.extras import require
from pmod_cli.families import find_family
from pmod_cli.families.agreement import agree
from pmod_cli.families.processing import load_processor
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.files import replacing
from pmod_cli.output.reading import read_json
from pmod_cli.recipe import load_recipe


def merge_adapter(source: Path, destination: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the checkpoint that an adapter and its base make together; the base is loaded into memory.

    ``force`` replaces a checkpoint that is there.

    Returns:
        What ``docs/json.md`` lists for ``pmod convert --json``, but ``pushed_to``.

    Raises:
        PmodError: The source is no adapter, its base is not there or another model, or the destination cannot be
            written.
    """
    started = time.perf_counter()
    if not (source / ADAPTER_CONFIG).is_file():
        raise PmodError(f"{source} is not an adapter: it has no {ADAPTER_CONFIG}", "leave --merge out")
    base = read_json(source / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise PmodError(f"{source / ADAPTER_CONFIG} names no base", "write base_model_name_or_path into it")
    check_destination(destination, source, force)
    require("peft")
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

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
        processor = load_processor(source)  # as it was trained: aspect, chat template
        if grids := getattr(processor.image_processor, "image_grid_pinpoints", None):
            loaded.model.config.image_grid_pinpoints = grids
        agree(loaded.model.config, processor)
    try:
        wrapped: Any = PeftModel.from_pretrained(loaded.model, source)
        names = (
            get_peft_model_state_dict(wrapped).keys() ^ load_peft_weights(str(source), device="cpu").keys()
        )
    except Exception as error:  # PEFT raises whatever the shapes and names of another model lead it into
        raise PmodError(f"{source} does not fit {base}: {first_line(error)}") from error
    if names:
        raise PmodError(
            f"{source} does not fit {base}: {len(names)} tensors are on one side alone, e.g. {min(names)}"
        )
    model = wrapped.merge_and_unload().to(getattr(torch, dtype))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_space(destination, size)
    with replacing(destination) as folder:
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
