"""Watches a task's code while it scores.

Much of lmms-eval's scoring goes on where it cannot: if the judge does not answer, or an exception is caught, a sample
gets 0 points, full marks or a random letter. `Watch` finds that out from outside.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any
from unittest import mock
from urllib.request import OpenerDirector

import numpy as np

from pmod_cli.evaluation import caught
from pmod_cli.evaluation.blame import told

_DRAWS = ("choice", "choices", "randint", "randrange", "random")
_SILENT = "the judge did not answer"


class Watch:
    """What went wrong in scoring without raising: failed judges, caught exceptions, errors in the log, random draws.

    A question that the judge answers in the end makes up for its failures before: most code tries several times.

    Args:
        functions: The task's code that scores.
        guesses: Whether random draws are allowed, because the metric is defined so.

    Attributes:
        doubt: The last exception that was caught for a fixed value and may be the answer's fault or the task's: the
            task's if it comes with every answer.
    """

    def __init__(self, functions: Iterable[FunctionType] = (), guesses: bool = False) -> None:
        self._functions, self._guesses = functions, guesses
        self.doubt: str | None = None
        self._trouble: dict[str | None, str] = {}  # by the question to a judge, if there was one before it
        self._asked: dict[int, str] = {}  # by thread: the last question

    def take(self) -> str | None:
        """What went wrong since the last call, if anything did; a judge's silence first, the cause of the rest."""
        trouble = min(self._trouble.values(), key=lambda what: _SILENT not in what, default=None)
        self._trouble.clear()
        self._asked.clear()
        self.doubt = None
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
        for client, name in ((requests.Session, "send"), (httpx.Client, "send"), (OpenerDirector, "open")):
            watched.append((client, name, self._judge(getattr(client, name))))
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
                stack.enter_context(caught.telling(self._functions, self._caught))
                yield self
        finally:
            logger.remove(sink)

    def _caught(self, error: BaseException, fixed: bool) -> None:
        what = f"scoring caught {told(error)}"
        judged = threading.get_ident() in self._asked
        if caught.from_surroundings(error) or (judged and fixed):
            self._note(what)
        elif fixed and not caught.from_reading(error):
            self.doubt = what

    @contextlib.contextmanager
    def _asking(self, *request: Any) -> Iterator[list[Any]]:
        """Notes what becomes of a question to a judge; the block puts the answer into the list."""
        question = "".join(map(_words, request))
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
            if not _posts(request, *args, **options):
                return call(client, request, *args, **options)
            with self._asking(request, *args) as answers:
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


def _posts(request: Any, data: Any = None, *_: Any, **options: Any) -> bool:
    """Whether a request asks for more than a page; urllib's may be an address with the data beside it."""
    method = getattr(request, "get_method", lambda: getattr(request, "method", "POST"))()
    address = isinstance(request, str)
    return (data or options.get("data")) is not None or (method == "POST" and not address)


def _words(request: Any) -> str:
    """What a request says, the same when it is made again."""
    words = str(getattr(request, "full_url", request))
    with contextlib.suppress(Exception):  # a stream has no content yet
        words += repr(
            next(getattr(request, name) for name in ("content", "body", "data") if hasattr(request, name))
        )
    return words
