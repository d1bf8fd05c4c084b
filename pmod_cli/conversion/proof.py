"""Proves on a tiny random model that a family works as p-MoD, before a checkpoint of it is written.

The model is of the checkpoint's own config classes, with few layers and a vocabulary of the tokens that are used; the
inputs are the checkpoint's processor's. With every ratio 1 the logits must be the dense model's, bit for bit; with
routers that choose, greedy answers with a cache must be those of full forward passes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pmod_cli.families.anything import classes_of
from pmod_cli.families.defaults import transformers_config
from pmod_cli.families.processing import in_groups, load_processor
from pmod_cli.modeling.decoders import unrouted
from pmod_cli.modeling.family import FamilyClasses
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError, first_line

LAYERS = 3
NEW_TOKENS = 4


def prove(folder: Path, config: dict[str, Any], classes: FamilyClasses | None = None) -> dict[str, Any]:
    """Prove it for a dense checkpoint; only its config and processor are read.

    Args:
        folder: Where its processor is.
        config: Its ``config.json``.
        classes: The family's; made by looking at transformers' classes if not given.

    Returns:
        For the new checkpoint: the classes that were found, and what was proved.

    Raises:
        PmodError: What differed, or why it could not be tried.
    """
    kind = config["model_type"]
    try:
        classes = classes or classes_of(kind)
        inputs = _inputs(folder)
        tiny, inputs = tiny_config(config, inputs)
        dense_class = next(
            base for base in classes.outer.__mro__ if base.__module__.startswith("transformers.")
        )
        torch.manual_seed(0)
        dense = _spread(dense_class(transformers_config(tiny))).eval()
        decoder = dense.get_decoder()
        kept = _routed(classes, tiny, dense, [1.0] * LAYERS)
        chosen = _routed(classes, tiny, dense, [None, *[0.5] * (LAYERS - 1)])
        with torch.no_grad():
            _compare(kind, dense, kept, chosen, inputs)
    except PmodError:
        raise
    except Exception as error:  # whatever transformers' code says of a model that it was not made for
        raise PmodError(f"{kind} cannot become p-MoD: {type(error).__name__}: {first_line(error)}") from error
    return {
        "config": dense.config_class.__name__,
        "model": dense_class.__name__,
        "inner": unrouted_name(dense.model),
        "decoder": unrouted(type(decoder)).__name__,
        "layer": unrouted(type(decoder.layers[0])).__name__,
        "proved": ["ratio 1 equals dense", "cached equals uncached"],
    }


def unrouted_name(module: Any) -> str:
    """Name of a module's transformers class."""
    return next(b.__name__ for b in type(module).__mro__ if b.__module__.startswith("transformers."))


def _inputs(folder: Path) -> dict[str, Tensor]:
    """Two prompts, the first with a picture, the second padded on the left."""
    processor = load_processor(folder)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (96, 128, 3), generator=generator, dtype=torch.uint8)
    pictures = [[Image.fromarray(noise.numpy())], [Image.fromarray(noise.numpy()).rotate(90, expand=True)]]
    texts = [f"What is on the sofa? {processor.image_token} Look", f"{processor.image_token} What"]
    made = processor(text=texts, images=in_groups(processor, pictures), padding=True, return_tensors="pt")
    return dict(made)


def tiny_config(
    config: dict[str, Any], inputs: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config of the same classes and widths with few layers, and inputs in its small vocabulary."""
    whole = copy.deepcopy(transformers_config(config).to_dict())
    used = {int(token) for token in inputs["input_ids"].unique()}
    for part in _parts(whole):
        if "eos_token_id" in part:  # it would end an answer, and full passes do not know of it
            part["eos_token_id"] = None
        for key, value in part.items():
            used |= set(_tokens(key, value))
    places = {token: place for place, token in enumerate(sorted(used))}
    for part in _parts(whole):
        for key, value in part.items():
            if tokens := _tokens(key, value):
                mapped = [places[token] for token in tokens]
                part[key] = mapped if isinstance(value, list) else mapped[0]
    text = whole["text_config"]
    text |= {"num_hidden_layers": LAYERS, "vocab_size": len(places) + 8, "intermediate_size": 64}
    if text.get("layer_types"):
        text["layer_types"] = (text["layer_types"] * LAYERS)[:LAYERS]
    ids = inputs["input_ids"]
    return whole, {
        **inputs,
        "input_ids": torch.tensor([[places[int(token)] for token in row] for row in ids]),
    }


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        config,
        *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict)),
    ]


def _tokens(key: str, value: Any) -> list[int]:
    """The ids that stand under a key of a config, which may be a list of them."""
    if not key.endswith(("_token_id", "_token_ids", "_token_index")):
        return []
    ids = value if isinstance(value, list) else [value]
    return ids if all(type(each) is int and each >= 0 for each in ids) else []


def _spread(model: Any) -> Any:
    """Weights large enough that answers differ."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def _routed(classes: FamilyClasses, tiny: dict[str, Any], dense: Any, ratios: list[float | None]) -> Any:
    """A p-MoD model on the dense one's own tensors; routers choose where a ratio is below 1."""
    config = classes.config.from_dict(
        {**copy.deepcopy(tiny), "model_type": classes.config.model_type, "mod": MoDConfig(ratios).to_dict()}
    )
    model = classes.outer(config).eval()
    model.load_state_dict(dense.state_dict(), strict=False, assign=True)
    for name, parameter in model.named_parameters():
        if ".router." in name and None in ratios:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _compare(kind: str, dense: Any, kept: Any, chosen: Any, inputs: dict[str, Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    expected, found = (model(**inputs).logits[real] for model in (dense, kept))
    if not torch.equal(expected, found):
        off = float((expected - found).abs().max())
        raise PmodError(
            f"{kind} cannot become p-MoD: a model that keeps every token differs from the dense one ({off:g})"
        )
    record = chosen(**inputs, output_routing=True).routing
    if all(layer is None for layer in record):
        raise PmodError(f"{kind} cannot become p-MoD: no layer met a picture's tokens")
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    length = inputs["input_ids"].shape[1]
    # What stands for a picture, or a part of one, would ask for one when the answer is read again.
    special = sorted(
        {id for part in _parts(dense.config.to_dict()) for each in part.items() for id in _tokens(*each)}
    )
    ids = chosen.generate(**inputs, **options, suppress_tokens=special)
    longer = {
        **inputs,
        "input_ids": ids,
        "attention_mask": F.pad(inputs["attention_mask"], (0, NEW_TOKENS), value=1),
    }
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in longer:
            longer[key] = F.pad(inputs[key], (0, NEW_TOKENS))
    logits = chosen(**longer).logits[:, length - 1 : -1]
    logits[..., special] = -torch.inf
    if not torch.equal(logits.argmax(-1), ids[:, length:]):
        raise PmodError(
            f"{kind} cannot become p-MoD: answers with a KV cache differ from full forward passes"
        )
