"""A share of the bad inputs, the same each time; ``python -m tests.robustness`` runs all."""

from __future__ import annotations

import subprocess
import sys


def test_bad_inputs_end_in_one_line():
    # A process of its own: forked children need one that runs no other threads.
    command = [sys.executable, "-m", "tests.robustness", "--share", "0.005"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
