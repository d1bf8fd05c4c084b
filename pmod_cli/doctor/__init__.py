"""What this machine can do: what ``pmod doctor`` finds out.

- ``packages``: pmod's own requirements (`pmod_cli.extras` has the optional ones); ``commands``: what each verb needs.
- ``checks``: the checks, one function each; ``attention``: the attention back end of a p-MoD model.
- ``probe``: runs checks in child processes. ``examine``: everything put together.

The process that the user started imports no torch.
"""
