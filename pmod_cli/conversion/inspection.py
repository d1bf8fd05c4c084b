"""What a p-MoD checkpoint says of itself: layers, routers, where it comes from. Reads only files with routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pmod_cli.checkpoints.load import refuse_part, refuse_unconverted
from pmod_cli.checkpoints.shards import StoredTensor, decode
from pmod_cli.checkpoints.source import open_source
from pmod_cli.conversion.decoder import ROUTER_DTYPES
from pmod_cli.conversion.plan import layer_table
from pmod_cli.families import find_family
from pmod_cli.modeling.names import is_router
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError


def inspect_checkpoint(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What ``docs/json.md`` lists for ``pmod inspect --json``; a number that is not finite is None.

    Of a hub id only files that hold routers are downloaded.

    Raises:
        PmodError: It is not a p-MoD checkpoint, or routers are missing.
    """
    source = open_source(model, revision=revision, only=is_router)
    refuse_part(source.folder)
    if not source.config:
        raise PmodError(f"{source.name} is not a checkpoint: it has no config.json")
    refuse_unconverted(source)
    family = find_family(source.model_type)
    if source.model_type != family.model_type:
        raise PmodError(f"{source.name} is a dense {family.name} checkpoint", "pmod convert makes it p-MoD")
    try:
        mod = MoDConfig.from_dict(source.config.get("mod") or {})
    except (TypeError, ValueError) as error:
        raise PmodError(f"{source.name}: bad mod section in config.json: {error}") from error
    tensors = {
        name: tensor
        for file in source.weight_files(only=is_router)
        for name, tensor in file.tensors.items()
        if is_router(name)
    }
    layers = layer_table(mod)
    for layer in mod.mod_layers:
        layers[layer]["router"] = _statistics(layer, tensors, mod)
    initial = sum(layers[layer]["router"]["initial"] for layer in mod.mod_layers)
    training = source.json("training.json")
    if training is not None:
        result = training.get("result") or {}
        training = {
            "model": training.get("model"),
            "steps": result.get("steps"),
            "final_loss": result.get("final_loss"),
        }
    return {
        "model": source.name,
        "family": family.name,
        "layers": layers,
        "mean_retention": mean_retention(mod.retention_ratios),
        "mod": mod.to_dict(),
        "router_dtype": next(iter(tensors.values())).dtype if tensors else "",
        "router_parameters": sum(int(np.prod(tensor.shape)) for tensor in tensors.values()),
        "initial_routers": initial,
        "initial_share": initial / len(mod.mod_layers) if mod.mod_layers else 0.0,
        "provenance": origin if isinstance(origin := source.config.get("pmod"), dict) else None,
        "training": training,
    }


def _statistics(layer: int, tensors: dict[str, StoredTensor], mod: MoDConfig) -> dict[str, Any]:
    found = {}
    for part in ("weight", "bias") if mod.router_bias else ("weight",):
        ending = f".layers.{layer}.router.{part}"
        tensor = next((tensor for name, tensor in tensors.items() if name.endswith(ending)), None)
        if tensor is None:
            raise PmodError(f"the weights lack {ending[1:]}")
        if tensor.dtype not in (*ROUTER_DTYPES, "F64"):
            raise PmodError(f"{tensor.name} has type {tensor.dtype}, which is not a router's")
        found[part] = decode(tensor.read(), tensor.dtype).astype(np.float64)
    weight, bias = found["weight"], found.get("bias")
    return {
        "weight_norm": _finite(np.linalg.norm(weight)),
        "weight_max": _finite(np.abs(weight).max()),
        "bias": None if bias is None else _finite(bias[0]),
        "initial": not any(values.any() for values in found.values()),
    }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
