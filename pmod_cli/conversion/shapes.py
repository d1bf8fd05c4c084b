"""Every tensor of a checkpoint against the model that its config makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.output.errors import PmodError, told_as


def check_shapes(config: dict[str, Any], tensors: Iterable[StoredTensor]) -> None:
    """Make the dense model on the meta device, and hold names and shapes against it; routers are not looked at.

    Raises:
        PmodError: A tensor is missing or has another shape, or the config makes no model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    given = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    with told_as("config.json makes no model"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(config["model_type"], **given))
    expected = model.state_dict()
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    missing = dict(expected)
    for tensor in tensors:
        name, _ = rename_source_key(tensor.name, rules, [], model.base_model_prefix, expected)
        missing.pop(name, None)
        if name in expected and tuple(expected[name].shape) != tensor.shape:
            empty = "a ZeRO-3 run has to gather its weights when it saves" if 0 in tensor.shape else None
            wanted = list(expected[name].shape)
            raise PmodError(
                f"{tensor.name} has shape {list(tensor.shape)}, and config.json (or its defaults) says {wanted}",
                empty,
            )
    for name in model.all_tied_weights_keys:
        missing.pop(name, None)
    if missing:
        name = next(iter(missing))
        tied = name.startswith("lm_head") or None
        raise PmodError(
            f"the weights lack {name}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            tied and "if the head is the embedding table, write tie_word_embeddings: true into config.json",
        )
