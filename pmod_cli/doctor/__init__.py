"""What this machine can do: what ``pmod doctor`` finds out.

- ``packages``: what pmod itself requires (`pmod_cli.extras` has the rest); ``commands``: what each command needs.
- ``checks``: the checks, one function each; ``probe``: runs them in child processes; ``examine``: all put together.

The process that the user started imports no torch.
"""
