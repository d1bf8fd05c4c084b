"""Runs the ``pmod`` commands that standard input asks for, one JSON object a line, and answers each with one.

A command needs seconds for its imports; here they are paid once for many.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

from pmod_cli.cli import main


def run(words: list[str], folder: str, token: str | None) -> dict[str, object]:
    """One command in a folder, with a token of the hub or none; its ``returncode``, ``stdout`` and ``stderr``."""
    os.chdir(folder)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return {"returncode": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    answers = sys.stdout
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)
