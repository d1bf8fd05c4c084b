"""A few kills of each quick command; ``python -m tests.robustness.kills`` does many, of all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_killed_at_random_moments_nothing_is_lost_or_left():
    words = ["--kills", "3", "--commands", "convert,finetune,report"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.kills", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
