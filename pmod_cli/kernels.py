"""Which kernels a loaded model runs: pmod's own for routing, and liger-kernel's for what every decoder has.

liger-kernel (https://linkedin.github.io/Liger-Kernel/) has fused RMSNorm, rotary embedding, SwiGLU and cross entropy
with their gradients, for inference and training. It is optional, and needs a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch

from pmod_cli.extras import require
from pmod_cli.output.errors import PmodError

CHOICES = ("auto", "torch", "liger")
"""``auto``: the fastest that is there; ``torch``: PyTorch alone; ``liger``: ``auto`` with liger-kernel, or an error."""


def use_kernels(model: Any, choice: str = "auto", on_gpu: bool | None = None) -> list[str]:
    """Let a loaded model, dense or p-MoD, run these kernels from now on.

    liger-kernel replaces the rotary embedding of the decoder's family in the whole process, norms and MLPs in this
    model alone.

    Args:
        model: A loaded model.
        choice: One of `CHOICES`.
        on_gpu: Whether it will run on a GPU; by default whether it is on one.

    Returns:
        What is used beside PyTorch: ``pmod``, ``liger``, both or neither.

    Raises:
        PmodError: If the choice is unknown, or liger-kernel is wanted and there is none, no GPU, or the decoder is
            of a family that it does not know.
    """
    if choice not in CHOICES:
        raise PmodError(f"unknown kernels {choice!r}", f"take one of {', '.join(CHOICES)}")
    decoder, used = model.get_decoder(), []
    if on_gpu is None:
        on_gpu = next(model.parameters()).is_cuda
    if hasattr(decoder, "kernels"):
        decoder.kernels = "torch" if choice == "torch" else "auto"
        used += ["pmod"] if choice != "torch" and on_gpu else []
    if choice == "liger" or (choice == "auto" and on_gpu and importlib.util.find_spec("liger_kernel")):
        if not on_gpu:
            raise PmodError("liger-kernel needs a GPU", "use --kernels auto")
        require("liger_kernel")
        if _apply_liger(model, decoder):
            used.append("liger")
        elif choice == "liger":
            kind = decoder.config.model_type
            raise PmodError(f"liger-kernel has no kernels for {kind} decoders", "use --kernels auto")
    return used


def _apply_liger(model: Any, decoder: Any) -> bool:
    """Whether liger-kernel knows the decoder's family; its norms, MLPs, rotary embedding and loss are then in place."""
    from liger_kernel.transformers.functional import liger_cross_entropy
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(decoder.config.model_type)
    if apply is None:
        return False
    wanted = {"rope": True, "rms_norm": True, "swiglu": True}
    wanted |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    known = inspect.signature(apply).parameters
    apply(model=decoder, **{name: value for name, value in wanted.items() if name in known})

    def loss(
        logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
    ) -> torch.Tensor:
        """As transformers' causal loss: tokens predict the next; the mean, or the sum over ``num_items_in_batch``."""
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        reduction = "mean" if num_items_in_batch is None else "sum"
        total: torch.Tensor = liger_cross_entropy(
            logits.view(-1, vocab_size), shifted.to(logits.device), reduction=reduction
        )
        return total if num_items_in_batch is None else total / num_items_in_batch

    model.loss_function = loss
    return True
