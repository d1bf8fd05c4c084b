"""Every tensor of a checkpoint, and its processor, against the model that its config makes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.output.errors import PmodError, first_line, told_as
from pmod_cli.output.files import to_json


def check_shapes(config: dict[str, Any], tensors: Iterable[StoredTensor]) -> None:
    """Make the dense model on the meta device, and hold names and shapes against it; routers are not looked at.

    Raises:
        PmodError: A tensor is missing or has another shape, or the config makes no model.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    with told_as("config.json makes no model"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(_parsed(config))
    expected = model.state_dict()
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    missing = dict(expected)
    for tensor in tensors:
        name, _ = rename_source_key(tensor.name, rules, [], model.base_model_prefix, expected)
        missing.pop(name, None)
        if name in expected and tuple(expected[name].shape) != tensor.shape:
            wanted = list(expected[name].shape)
            raise PmodError(
                f"{tensor.name} has shape {list(tensor.shape)}, and config.json (or its defaults) says {wanted}"
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


def check_processor(config: dict[str, Any], files: Mapping[str, Path | bytes]) -> str | None:
    """Load the processor that is among a checkpoint's files, and hold it against the config; see `agree`.

    Returns:
        A note for the user where there is none, or none that can be loaded: the weights alone can be converted.

    Raises:
        PmodError: They do not belong together.
    """
    from pmod_cli.families.agreement import agree
    from pmod_cli.families.processing import load_processor

    with tempfile.TemporaryDirectory() as folder:
        for name, file in files.items():
            if isinstance(file, bytes):
                (Path(folder) / name).write_bytes(file)
            else:
                (Path(folder) / name).symlink_to(file.resolve())
        (Path(folder) / "config.json").write_bytes(to_json(config))
        try:
            processor = load_processor(folder)
        except Exception as error:  # whatever transformers makes of files that lack something
            return f"no processor could be loaded, which answering and training need: {first_line(error)}"
    agree(_parsed(config), processor)
    return None


def _parsed(config: dict[str, Any]) -> Any:
    """The transformers config."""
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(config["model_type"], **given)
