"""Tasks that a paid judge scores: told by their code before a model is loaded, and watched while they score.

Much of lmms-eval's scoring goes on where it cannot: if the judge does not answer, or an exception is caught, a sample
gets 0 points, full marks or a random letter. `Watch` finds that out from outside.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
import re
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from unittest import mock

import numpy as np

_CLIENTS = {"anthropic", "boto3", "dashscope", "google", "litellm", "openai", "reka"}
_JUDGES = {
    "lmms_eval.llm_judge": "OPENAI_API_KEY",
    "lmms_eval.verifiers.openai": "OPENAI_API_KEY",
    "lmms_eval.verifiers.gemini": "GOOGLE_API_KEY",
}
_DRAWS = ("choice", "choices", "randint", "randrange", "random")
_SILENT = "the judge did not answer"
_LIBRARIES = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")})
_VARIABLE = re.compile(r"""(?:getenv|environ(?:\.get)?)\s*[\[(]\s*["'](\w+)["']""")


def missing_key(config: Mapping[str, Any]) -> str | None:
    """The environment variable with the key, or the address, of a task's judge, if there is a judge and none is set.

    ``config`` is the task's YAML with the functions that it names. A task has a judge if its scoring code can reach a
    client of a paid model, or posts requests with a key or to an address that it has from the environment.
    """
    metrics = [entry.get("aggregation") for entry in config.get("metric_list") or []]
    names, files = _reachable([config.get("process_results"), *metrics])
    kind = os.environ.get("API_TYPE", "openai").lower()
    if kind not in ("openai", "azure", "async_openai", "async_azure"):
        return None  # a judge that has other credentials, or needs none
    azure = "azure" in kind
    keys = {key for module, key in _JUDGES.items() if any(name.startswith(module) for name in names)}
    client = any(name.split(".")[0] in _CLIENTS for name in names)
    posts = {"requests", "post"} <= names
    read = {name for file in files for name in _VARIABLE.findall(file.read_text("utf-8"))}
    if client or posts:
        keys |= {name for name in read if name.endswith("API_KEY")}
        if client and not keys:
            keys = {"OPENAI_API_KEY"}
    if azure and "OPENAI_API_KEY" in keys:
        keys.add("AZURE_API_KEY")
    wanted = {key for key in keys if ("AZURE" in key) == azure} or keys
    if posts and not wanted:
        wanted = {name for name in read if name.endswith(("API_URL", "BASE_URL"))}
    if not wanted or any(map(os.environ.get, wanted)):
        return None
    usual = "AZURE_API_KEY" if azure else "OPENAI_API_KEY"
    return usual if usual in wanted else min(wanted)


def _reachable(functions: list[Any]) -> tuple[set[str], set[Path]]:
    """All names in the code of functions and of what they call in the tasks' own files; and those files."""
    names: set[str] = set()
    files: set[Path] = set()
    seen: set[int] = set()
    waiting = list(functions)
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
        elif isinstance(value, (FunctionType, MethodType)):
            function = inspect.unwrap(getattr(value, "__func__", value))
            names.add(function.__module__ or "")
            file = function.__code__.co_filename
            if file.startswith(_LIBRARIES) and "lmms_eval/tasks" not in Path(file).as_posix():
                continue
            if function.__name__.endswith("_static") or not Path(file).is_file():
                continue  # the same code with the judge left out; or no code that can be read
            files.add(Path(file))
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
    return names, files


class Watch:
    """What went wrong in scoring without raising: judges that failed, errors in lmms-eval's log, random draws.

    A question that the judge answers in the end makes up for its failures before: most code tries several times.

    Args:
        guesses: Whether random draws are allowed, because the metric is defined so.
    """

    def __init__(self, guesses: bool = False) -> None:
        self._guesses = guesses
        self._trouble: dict[str | None, str] = {}  # by the question to a judge, if there was one before it
        self._asked: dict[int, str] = {}  # by thread: the last question

    def take(self) -> str | None:
        """What went wrong since the last call, if anything did; a judge's silence first, the cause of the rest."""
        trouble = min(self._trouble.values(), key=lambda what: _SILENT not in what, default=None)
        self._trouble.clear()
        self._asked.clear()
        return trouble

    def _note(self, what: str, question: str | None = None) -> None:
        question = question or self._asked.get(threading.get_ident())
        self._trouble.setdefault(question, " ".join(what.split())[:300])

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Watch until the end of the block."""
        import httpx
        import requests
        from lmms_eval.llm_judge import ProviderFactory
        from loguru import logger

        watched: list[tuple[Any, str, Any]] = []
        for provider in set(ProviderFactory._provider_classes.values()):
            watched.append((provider, "evaluate", self._judge(provider.evaluate)))
        for client in (requests.Session, httpx.Client):
            watched.append((client, "send", self._judge(client.send)))
        watched.append((httpx.AsyncClient, "send", self._async_judge(httpx.AsyncClient.send)))
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

    @contextlib.contextmanager
    def _asking(self, request: Any) -> Iterator[list[Any]]:
        """Notes what becomes of a question to a judge; the block puts the answer into the list."""
        question = repr(request)
        with contextlib.suppress(Exception):  # a stream has no content yet
            question += repr(request.content if hasattr(request, "content") else request.body)
        self._asked[threading.get_ident()] = question
        answers: list[Any] = []
        try:
            yield answers
        except Exception as error:
            self._note(f"{_SILENT}: {type(error).__name__}: {error}", question)
            raise
        if (status := getattr(answers[0], "status_code", 200)) >= 400:
            self._note(f"{_SILENT}: HTTP status {status}", question)
        else:
            self._trouble.pop(question, None)

    def _judge(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(client: Any, request: Any, *args: Any, **options: Any) -> Any:
            if getattr(request, "method", "POST") != "POST":
                return call(client, request, *args, **options)
            with self._asking(request) as answers:
                answers.append(call(client, request, *args, **options))
            return answers[0]

        return asked

    def _async_judge(self, call: Callable[..., Any]) -> Callable[..., Any]:
        async def asked(client: Any, request: Any, *args: Any, **options: Any) -> Any:
            with self._asking(request) as answers:
                answers.append(await call(client, request, *args, **options))
            return answers[0]

        return asked

    def _draw(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*args: Any, **options: Any) -> Any:
            self._note("the score would be a guess: the task draws at random where it finds no answer")
            return call(*args, **options)

        return drawn
