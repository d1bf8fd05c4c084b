"""``python -m pmod_cli``: the same as the ``pmod`` command (for ``torchrun -m pmod_cli ...``)."""

from pmod_cli.cli import main

if __name__ == "__main__":
    main()
