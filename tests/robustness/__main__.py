"""``python -m tests.robustness``: run all bad inputs, or a share of them, or those whose names hold a word."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "120",
}

from tests.robustness.cases import cases
from tests.robustness.good import import_all, make_good
from tests.robustness.runner import failures


def run(share: float, word: str, seed: int) -> int:
    """Run them and print what went wrong; the number of inputs that it went wrong with."""
    ran: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    import_all()
    with tempfile.TemporaryDirectory(prefix="pmod-good-") as base:
        good = Path(base, "good")
        good.mkdir()
        for variable in ("HF_DATASETS_CACHE", "LMMS_EVAL_DATASETS_CACHE", "PMOD_CACHE"):
            os.environ[variable] = str(Path(base, "cache"))
        make_good(good)
        for case in cases(good):
            if word not in case.name or random.Random(f"{seed} {case.name}").random() >= share:
                continue
            ran[case.command] += 1
            if wrong := failures(case, good):
                failed[case.command] += 1
                print(ascii(case.name), *(f"  {line}" for line in wrong), sep="\n", flush=True)
    print(f"{ran.total()} inputs {dict(ran)}, failed {failed.total()} {dict(failed)}")
    return failed.total()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--word", default="")
    parser.add_argument("--seed", type=int, default=0, help="Which of them a share holds.")
    given = parser.parse_args()
    sys.exit(bool(run(given.share, given.word, given.seed)))
