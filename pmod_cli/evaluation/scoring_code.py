"""The code that scores a task: what its functions can reach in the tasks' own files."""

from __future__ import annotations

import functools
import inspect
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

_LIBRARIES = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")})


class ScoringCode(NamedTuple):
    """All names in the code, the files that it is in, and its functions."""

    names: set[str]
    files: set[Path]
    functions: list[FunctionType]


def scoring_code(entries: Iterable[Any]) -> ScoringCode:
    """The code behind ``entries``: a task's ``process_results`` and its metrics' aggregations."""
    names: set[str] = set()
    files: set[Path] = set()
    functions: list[FunctionType] = []
    seen: set[int] = set()
    waiting = list(entries)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, ModuleType):
            names.add(value.__name__)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, functools.partial):
            waiting.append(value.func)
        elif isinstance(value, (FunctionType, MethodType, functools._lru_cache_wrapper)):
            function = getattr(value, "__func__", value)
            waiting.append(getattr(function, "__wrapped__", None))  # what a decorator was put on
            if not isinstance(function, FunctionType):
                continue
            names.add(function.__module__ or "")
            file = function.__code__.co_filename
            if file.startswith(_LIBRARIES) and "lmms_eval/tasks" not in Path(file).as_posix():
                continue
            if function.__name__.endswith("_static") or not Path(file).is_file():
                continue  # the same code with the judge left out; or no code that can be read
            files.add(Path(file))
            functions.append(function)
            waiting += inspect.getclosurevars(function).nonlocals.values()
            codes: list[CodeType] = [function.__code__]
            for code in codes:
                codes += [each for each in code.co_consts if isinstance(each, CodeType)]
                names |= set(code.co_names)
                for name in code.co_names:
                    known = function.__globals__.get(name)
                    waiting.append(known)
                    if isinstance(known, ModuleType):
                        waiting += [vars(known).get(each) for each in code.co_names]
        elif value is not None:
            kind = value if isinstance(value, type) else type(value)
            names.add(kind.__module__ or "")
            for owner in kind.__mro__:
                methods = [getattr(each, "__func__", each) for each in vars(owner).values()]
                waiting += [each for each in methods if isinstance(each, FunctionType)]
    return ScoringCode(names, files, functions)
