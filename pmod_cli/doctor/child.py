"""The child process of a probe: runs checks, one after the other, and writes a line for each as it begins and ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any


def main(names: Sequence[str]) -> None:
    """Run checks and end the process.

    Args:
        names: Of `pmod_cli.doctor.checks.CHECKS`.
    """
    # What an import prints, from C too, must not get among the results.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from pmod_cli.doctor.checks import CHECKS, result
    from pmod_cli.extras import reason

    def write(line: dict[str, Any]) -> None:
        results.write(json.dumps(line) + "\n")
        results.flush()

    for name in names:
        sys.stderr.flush()
        # How far the log was: should this check kill the process, what comes after it are the last words.
        write({"begun": name, "log": os.lseek(2, 0, os.SEEK_CUR)})
        try:
            found = CHECKS[name]()
        except (Exception, SystemExit) as error:
            found = result("broken", error=reason(error), remedy="see the packages above")
        write({"check": name, **found})
    sys.stderr.flush()
    os._exit(0)  # torch takes its time to be taken down, and somebody's exit handlers could hang
