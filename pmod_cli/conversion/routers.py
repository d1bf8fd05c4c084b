"""The schedule of a conversion and its routers: zeros, so that training starts where the baseline stands."""

from __future__ import annotations

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.conversion.decoder import DecoderLayout
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError


def router_tensors(
    mod: MoDConfig, layout: DecoderLayout, given: dict[int, dict[str, StoredTensor]]
) -> list[StoredTensor]:
    """The routers of every Mixture-of-Depths layer: those given, or zeros in the decoder's dtype.

    Args:
        mod: Which layers, and whether routers have a bias.
        layout: Names, width and dtype.
        given: Tensors that the source has, by layer; all of them, or none.

    Raises:
        PmodError: A router is missing or has the wrong shape.
    """
    shapes = {"weight": (1, layout.hidden)} | ({"bias": (1,)} if mod.router_bias else {})
    tensors = []
    for layer in mod.mod_layers:
        for part, shape in shapes.items():
            name = layout.router_name(layer, part)
            if not given:
                tensors.append(StoredTensor.zeros(name, layout.dtype, shape))
                continue
            tensor = given.get(layer, {}).get(part)
            if tensor is None or tensor.shape != shape:
                what = (
                    "is missing" if tensor is None else f"has shape {list(tensor.shape)}, not {list(shape)}"
                )
                raise PmodError(f"the {part} of layer {layer}'s router {what} in the source")
            tensors.append(tensor.renamed(name))
    return tensors
