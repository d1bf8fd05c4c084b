"""Tasks that a paid judge scores: told by their code before a model is loaded, and watched while they score.

Much of lmms-eval's scoring goes on where it cannot: if the judge does not answer, or an exception is caught, a sample
gets 0 points, full marks or a random letter. `Watch` finds that out from outside.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

import numpy as np

_CLIENTS = ("openai", "anthropic", "google.generativeai", "google.genai", "dashscope", "litellm", "boto3")
_JUDGES = ("lmms_eval.llm_judge", "lmms_eval.verifiers.openai")
_DRAWS = ("choice", "choices", "randint", "randrange", "random")
_LIBRARIES = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")})


def missing_key(config: Mapping[str, Any]) -> str | None:
    """The environment variable with the key of a task's judge, if there is a judge and none of its keys is set.

    ``config`` is the task's YAML with the functions that it names. A task has a judge if its scoring code can reach a
    client of a paid model, or posts requests with a key.
    """
    metrics = [entry.get("aggregation") for entry in config.get("metric_list") or []]
    names = _reachable([config.get("process_results"), *metrics])
    kind = os.environ.get("API_TYPE", "openai")
    posts = {"requests", "post"} <= names and any("API_KEY" in name for name in names)
    judged = posts or any(name.startswith((*_CLIENTS, *_JUDGES)) for name in names)
    if not judged or kind not in ("openai", "azure", "async_openai", "async_azure"):
        return None  # without a judge; or with one that has other credentials, or needs none
    variables = ["AZURE_API_KEY" if "azure" in kind else "OPENAI_API_KEY"]
    variables += sorted(name for name in names if name.endswith("_API_KEY") and name.isupper())
    return None if any(map(os.environ.get, variables)) else variables[0]


def _reachable(functions: list[Any]) -> set[str]:
    """All names and strings in the code of functions and of what they call in the tasks' own files.

    Keys are often read where the module begins: their names count too.
    """
    names: set[str] = set()
    seen: set[int] = set()
    waiting: list[Any] = [function for function in functions if callable(function)]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, type) or not isinstance(value, FunctionType):
            kind = value if isinstance(value, type) else type(value)
            module = kind.__module__ or ""
            if module.startswith((*_CLIENTS, *_JUDGES)):
                names.add(module)
            elif module.startswith("lmms_eval.tasks") or not _is_library(inspect.getmodule(kind)):
                waiting += [each for each in vars(kind).values() if isinstance(each, FunctionType)]
            continue
        value = inspect.unwrap(value)
        path = value.__code__.co_filename
        if value.__name__.endswith("_static"):  # the same code with the judge left out
            continue
        if (value.__module__ or "").startswith(_JUDGES):
            names.add(value.__module__)
        if path.startswith(_LIBRARIES) and "lmms_eval/tasks" not in path:
            continue
        names |= {name for name in value.__globals__ if name.endswith("API_KEY")}
        codes: list[CodeType] = [value.__code__]
        for code in codes:
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
            names |= {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}
            waiting += [value.__globals__[name] for name in code.co_names if name in value.__globals__]
    return names


def _is_library(module: ModuleType | None) -> bool:
    return module is None or (getattr(module, "__file__", None) or "").startswith(_LIBRARIES)


class Watch:
    """What went wrong in scoring without raising: judges that failed, errors in lmms-eval's log, random draws.

    Args:
        guesses: Whether random draws are allowed, because the metric is defined so.
    """

    def __init__(self, guesses: bool = False) -> None:
        self._guesses = guesses
        self._trouble: dict[int, str] = {}

    def take(self) -> str | None:
        """What went wrong since the last call, if anything did."""
        trouble = next(iter(self._trouble.values()), None)
        self._trouble.clear()
        return trouble

    def _note(self, what: str) -> None:
        self._trouble.setdefault(threading.get_ident(), " ".join(what.split())[:300])

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Watch until the end of the block."""
        import httpx
        import requests
        from lmms_eval.llm_judge import ProviderFactory
        from loguru import logger

        providers = set(ProviderFactory._provider_classes.values())
        watched: list[tuple[Any, str, Any]] = [
            (provider, "evaluate", self._judge(provider.evaluate)) for provider in providers
        ]
        watched += [(each, "send", self._judge(each.send)) for each in (requests.Session, httpx.Client)]
        for module in () if self._guesses else (random, np.random):
            watched += [
                (module, name, self._draw(getattr(module, name))) for name in _DRAWS if hasattr(module, name)
            ]
        sink = logger.add(
            lambda line: self._note(f"lmms-eval logged: {line}"), level="ERROR", format="{message}"
        )
        try:
            with contextlib.ExitStack() as stack:
                for owner, name, replacement in watched:
                    stack.enter_context(mock.patch.object(owner, name, replacement))
                yield self
        finally:
            logger.remove(sink)

    def _judge(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A judge's answer makes up for what failed before it: most code tries several times."""

        def asked(self_: Any, request: Any, *args: Any, **options: Any) -> Any:
            if getattr(request, "method", "POST") != "POST":
                return call(self_, request, *args, **options)
            try:
                answer = call(self_, request, *args, **options)
            except Exception as error:
                self._note(f"the judge did not answer: {type(error).__name__}: {error}")
                raise
            if (status := getattr(answer, "status_code", 200)) >= 400:
                self._note(f"the judge did not answer: HTTP status {status}")
            else:
                self._trouble.pop(threading.get_ident(), None)
            return answer

        return asked

    def _draw(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*args: Any, **options: Any) -> Any:
            self._note("the score would be a guess: the task draws at random where it finds no answer")
            return call(*args, **options)

        return drawn
