"""The ``pmod`` program, and ``python -m pmod_cli`` (for ``torchrun -m pmod_cli ...``)."""

import os
import signal


def main() -> None:
    """Run the command line; a signal before or after it, when nothing is at work, ends the program at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    from pmod_cli.cli import main as run

    run()


if __name__ == "__main__":
    main()
