"""``python -m tests.robustness``: all bad inputs and many kills; see its ``--help`` for fewer."""

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
from tests.robustness.kills import COMMANDS, kill_all
from tests.robustness.runner import failures


def fuzz(good: Path, share: float, word: str, seed: int, first: int, last: int) -> int:
    """Run bad inputs and print what went wrong; the number of inputs that it went wrong with."""
    ran: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for number, case in enumerate(cases(good), 1):
        if not first <= number <= last or word not in case.name:
            continue
        if random.Random(f"{seed} {case.name}").random() >= share:
            continue
        if not ran.total() % 100:
            print(f"at number {number}", file=sys.stderr, flush=True)
        ran[case.command] += 1
        if wrong := failures(case, good):
            failed[case.command] += 1
            print(ascii(case.name), *(f"  {line}" for line in wrong), sep="\n", flush=True)
    print(f"{ran.total()} inputs {dict(ran)}, failed {failed.total()} {dict(failed)}", flush=True)
    return failed.total()


def main() -> int:
    """Command line; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="Of the bad inputs.")
    parser.add_argument(
        "--range", default="1:", help="Of their numbers, e.g. 1:4000 and 4001: in two processes."
    )
    parser.add_argument("--word", default="", help="Only inputs whose names hold it.")
    parser.add_argument("--kills", type=int, default=60, help="Of each command.")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="Those that are killed.")
    parser.add_argument("--seed", type=int, default=0, help="Which inputs a share holds; when kills come.")
    given = parser.parse_args()
    import_all()
    with tempfile.TemporaryDirectory(prefix="pmod-good-") as base:
        good = Path(base, "good")
        good.mkdir()
        for variable in ("HF_DATASETS_CACHE", "LMMS_EVAL_DATASETS_CACHE", "PMOD_CACHE"):
            os.environ[variable] = str(Path(base, "cache"))
        make_good(good)
        first, last = given.range.split(":")
        failed = fuzz(good, given.share, given.word, given.seed, int(first), int(last or sys.maxsize))
        killed = given.commands.split(",") if given.kills else []
        wrong = kill_all(good, killed, given.kills, given.seed)
    print(*wrong, f"kills {dict.fromkeys(killed, given.kills)}, wrong {len(wrong)}", sep="\n")
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
