"""A share of the bad inputs and a few kills, the same each time; ``python -m tests.robustness`` runs all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_bad_inputs_and_kills_end_in_one_line_and_lose_nothing():
    # A process of its own: forked children need one that runs no other threads.
    words = ["--share", "0.0025", "--kills", "2", "--commands", "convert,finetune,report"]
    command = [sys.executable, "-m", "tests.robustness", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
