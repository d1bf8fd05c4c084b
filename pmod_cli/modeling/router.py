"""The router: one logit per token, its normalised weight, and the choice of the tokens that a layer keeps.

p-MoD, arXiv 2412.04449, section 3.1 (TanhNorm); exact semantics as recorded from the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.modeling.weight_norm import WEIGHT_NORMS


class Router(nn.Module):
    """One linear map ``hidden_size -> 1``, zero at the start, so that every weight starts at ``weight_bias``.

    Logits and weights are computed in fp32 whatever the model's dtype: in half precision a few dozen distinct
    values would have to rank hundreds of tokens.

    Args:
        hidden_size: Width of the decoder's residual stream.
        config: Weight normalisation and whether there is a bias.
    """

    def __init__(self, hidden_size: int, config: MoDConfig) -> None:
        super().__init__()
        self.norm, self.scale, self.offset = config.weight_norm, config.weight_scale, config.weight_bias
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1)) if config.router_bias else None

    def reset_parameters(self) -> None:
        """Zero the router: the layer then starts as the baseline's."""
        for parameter in self.parameters():
            init.zeros_(parameter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Raw logits.

        Args:
            hidden_states: Residual stream (not normalised), [batch, tokens, hidden].

        Returns:
            Logits in fp32, [batch, tokens].
        """
        bias = None if self.bias is None else self.bias.float()
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return F.linear(hidden_states.float(), self.weight.float(), bias).squeeze(-1)
        return F.linear(hidden_states.float(), self.weight.float(), bias).squeeze(-1)

    def weights(self, logits: Tensor, target_mask: Tensor) -> Tensor:
        """Normalised weights ``offset + scale * f(logit)``; 1 for every token that is not routed.

        Args:
            logits: [batch, tokens], fp32.
            target_mask: True for routed (vision) tokens, [batch, tokens].

        Returns:
            Weights in fp32, [batch, tokens].
        """
        normalised = WEIGHT_NORMS[self.norm](logits, target_mask)
        return torch.where(target_mask, self.offset + self.scale * normalised, 1.0)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.weight.shape[-1]} -> 1, {self.offset:g} + {self.scale:g} * {self.norm}"


LAYER_SHIFT = 588410519
"""0.137 of 2**32: by how much the tie-break moves on in every layer."""


GOLDEN_STEP = 0x9E3779B1
"""The golden ratio, of 2**32: from token to token where pictures have no fixed grid."""

_DOWN, _ACROSS = 0.5698402909980532, 0.7548776662466927
"""Powers of the reciprocal plastic number: the best two-dimensional lattice of this kind (Roberts 2018, R2)."""


def grid_step(width: int) -> int:
    """A step from token to token, of 2**32, for pictures of ``width`` tokens a row.

    A row down is then 0.5698 modulo 1, and a token across as near 0.7549 as that allows: low-discrepancy in the plane.
    """
    return round((round(width * _ACROSS - _DOWN) + _DOWN) / width * 2**32)


def spread_rank(target_mask: Tensor, layers: int = 1, step: int = GOLDEN_STEP) -> Tensor:
    """Ranks for breaking exact ties, such that the first k of a layer lie evenly over the image for every k.

    Token j of a sample's routed tokens gets ``j * step + 0.137 * layer`` modulo 1 in 32-bit integers (Fibonacci
    hashing), which is the same on every device. Its prefixes are low-discrepancy along rows and columns. The shift
    lets each layer keep other tokens: the same few in all layers would lose the rest of the picture for good.

    Args:
        target_mask: True for routed tokens, [batch, tokens].
        layers: Number of decoder layers.
        step: `GOLDEN_STEP`, or what `grid_step` gives for a fixed grid.

    Returns:
        Ranks below 2**32, smallest first, int64 [layers, batch, tokens].
    """
    order = target_mask.long().cumsum(-1) - 1
    shifts = torch.arange(layers, device=order.device)[:, None, None] * LAYER_SHIFT
    return (order * step + shifts) & 0xFFFFFFFF


def coverage_term(rank: Tensor, strengths: Tensor) -> Tensor:
    """What is added to the logits for ranking, so that a layer keeps tokens that lie evenly over the picture.

    Between 0 for the token that `spread_rank` puts first and minus the layer's strength for the last. A strength far
    above the spread of the logits leaves only the even pattern. Computed once per forward pass and only added later,
    so that no device rounds it otherwise.

    Args:
        rank: What `spread_rank` gave, [layers, batch, tokens].
        strengths: fp32 [layers].

    Returns:
        fp32 [layers, batch, tokens].
    """
    leading = (rank >> 8).float()  # 24 bits, which fp32 holds exactly
    return leading * (strengths * -(2.0**-24))[:, None, None] + 0.0  # no -0.0: see `selection_keys`


def random_rank(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Ranks in place of `spread_rank`'s that put tokens in a random order, another in each layer and sample.

    Args:
        shape: (layers, batch, tokens).
        generator: On the CPU; torch's own by default.

    Returns:
        int64 [layers, batch, tokens], on the CPU.
    """
    return torch.rand(*shape, generator=generator).argsort(-1)


def selection_keys(
    logits: Tensor,
    target_mask: Tensor,
    real_mask: Tensor | None,
    rank: Tensor,
    coverage: Tensor | None = None,
) -> Tensor:
    """Integers whose descending order is the order in which a layer keeps tokens.

    First every real token that is not routed, then routed tokens by logit plus coverage, exact ties by `spread_rank`,
    last padding. No two routed tokens of a sample share a key, so the choice does not depend on the device's top-k.

    Args:
        logits: [batch, tokens], fp32.
        target_mask: True for routed tokens, [batch, tokens].
        real_mask: False for padding, [batch, tokens]; None if nothing is padded.
        rank: What `spread_rank` gave for the layer, [batch, tokens].
        coverage: What `coverage_term` gave for the layer, [batch, tokens]; None is 0.

    Returns:
        int64 [batch, tokens].
    """
    # + 0.0 makes -0.0 and 0.0 the same bits
    bits = (logits.detach() + (0.0 if coverage is None else coverage)).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # order of the floats, as signed integers
    keys = (ordered.long() << 32) | (0xFFFFFFFF - rank)
    limits = torch.iinfo(torch.int64)
    keys = keys.masked_fill(~target_mask, limits.max)
    return keys if real_mask is None else keys.masked_fill(~real_mask, limits.min)


def select_tokens(
    keys: Tensor, lengths: list[int], device_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The tokens that a layer keeps, in their original order.

    Args:
        keys: What `selection_keys` gave, [batch, tokens].
        lengths: How many tokens each sample keeps, text included.
        device_lengths: The same where the keys are, [batch], if somebody brought them there already.

    Returns:
        Indices [batch, max(lengths)] and a mask [batch, max(lengths)], None if all lengths are equal. A sample's
        kept tokens come first, ascending. Where it has fewer than others the mask is False and the index is some
        token that it does not keep: at the end, where no kept token's causal attention sees it.
    """
    longest = max(lengths)
    top = keys.topk(longest, dim=-1).indices
    if min(lengths) == longest:
        return top.sort(dim=-1).values, None
    if device_lengths is None:
        device_lengths = torch.tensor(lengths, device=keys.device)
    used = torch.arange(longest, device=keys.device) < device_lengths[:, None]
    behind = (~used) * keys.shape[1]
    return (top + behind).sort(dim=-1).values - behind, used
