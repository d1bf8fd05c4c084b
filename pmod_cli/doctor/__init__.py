"""What this machine can do: what ``pmod doctor`` finds out.

- ``packages``: pmod's own requirements, as `pmod_cli.extras` has the optional ones; ``commands``: what each verb needs.
- ``checks``: one function a check; they run in child processes, because an import can crash, exit or hang.
- ``child`` and ``probe``: the two ends of that. ``attention``: the attention back end of a p-MoD model, and why.
- ``examine``: everything put together.

Nothing is imported here, and torch by no module that the parent process imports.
"""
