"""``python -m tests.robustness [SHARE] [WORD]``: run the bad inputs, or a share of them, whose names hold a word."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "120",
}

import pmod_cli.conversion.convert
import pmod_cli.profiling.command
import pmod_cli.report.write  # noqa: F401  (imported once, for all children)
from tests.robustness.cases import cases, make_good
from tests.robustness.runner import failures


def run(share: float, word: str) -> int:
    """Run them and print what went wrong; the number of cases that failed."""
    chosen = [case for case in cases() if word in case.name and random.Random(case.name).random() < share]
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="pmod-good-") as base:
        make_good(Path(base))
        for case in chosen:
            if wrong := failures(case, Path(base)):
                failed[case.words[0]] += 1
                print(ascii(case.name), *(f"  {line}" for line in wrong), sep="\n")
    print(f"{len(chosen)} inputs {dict(Counter(case.words[0] for case in chosen))}, failed {dict(failed)}")
    return failed.total()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(min(1, run(float(arguments[0]) if arguments else 1, arguments[1] if len(arguments) > 1 else "")))
