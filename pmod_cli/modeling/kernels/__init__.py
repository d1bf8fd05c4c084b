"""Fused kernels of a Mixture-of-Depths layer, in Triton, one file each beside its PyTorch reference.

- ``route``: logits, weights, ranking keys and the weighted residual, in one pass over the residual.
- ``select``: the kept tokens of each sample, in order.
- ``gather``: rows of the kept tokens, normalised, with their rows of the rotary tables.
- ``add_norm``: residual plus attention, normalised for the MLP.
- ``scatter``: the processed tokens, reweighted, back into the residual.

Each is an operator ``pmod::...`` for inference. On CPUs the operator runs its reference, or with ``TRITON_INTERPRET=1``
the kernel in Triton's interpreter. Under autograd and ``torch.compile`` the layer takes its PyTorch path instead.
Sizes are never specialised: a prompt of a new length compiles nothing.
"""
