"""Which line of a task's own code an error comes from."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parents[1]))

_OF_A_TASK = re.compile("lmms_eval/tasks/[^/]+/")  # beside the folders of tasks is what loads them


def told(error: BaseException) -> str:
    """What an error says, in one line, and the file and line of a task's code that raised it, if one did."""
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        own = not frame.filename.startswith(_LIBRARIES) or _OF_A_TASK.search(Path(frame.filename).as_posix())
        if own and Path(frame.filename).is_file():
            return f"{text} ({frame.filename}, line {frame.lineno})"
    return text
