"""Exceptions that a task's scoring code catches itself, and what they mean for the score.

Reading an answer may fail: ``except Exception: score = 0`` around ``float(answer)`` is how many tasks score, and right.
It is wrong around a judge, a file or an import, and nothing tells which of both it was. So each such handler is made to
tell what it caught, and the exception's type decides.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any
from unittest import mock

_HOOK = "__pmod_caught__"
_BROAD = ("Exception", "BaseException")
_TIDYING = {
    "close",
    "kill",
    "makedirs",
    "mkdir",
    "remove",
    "rmdir",
    "rmtree",
    "shutdown",
    "terminate",
    "unlink",
}

_SURROUNDINGS = (OSError, ImportError, NameError, RuntimeError)
"""Files, network, packages, the code itself: nothing that an answer says raises these."""
_CLIENTS = ("aiohttp", "anthropic", "google", "grpc", "httpcore", "httpx", "litellm", "openai", "urllib3")
_READING = (
    ValueError,
    SyntaxError,
    IndexError,
    TimeoutError,
    RecursionError,
    NotImplementedError,
    MemoryError,
)
"""What reading an odd answer raises; sums of an answer's formula may take too long."""

Note = Callable[[BaseException, bool], None]
"""Told of an exception, and whether its handler gives nothing but a fixed value."""


@contextlib.contextmanager
def telling(functions: Iterable[FunctionType], note: Note) -> Iterator[None]:
    """Within it, broad handlers in ``functions`` tell ``note`` what they catch.

    They are ``except:``, ``except Exception:`` and ``suppress(Exception)``.
    The functions run their own code, compiled from their file with one call more at the top of each such handler. One
    that raises again is left alone, and so is one around nothing but tidying up.
    """

    def caught(fixed: bool) -> None:
        if (error := sys.exc_info()[1]) is not None:
            note(error, fixed)

    files: dict[str, dict[tuple[str, int], CodeType]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(builtins, _HOOK, caught, create=True))
        for function in functions:
            own = function.__code__
            if own.co_filename not in files:
                files[own.co_filename] = _hooked(own.co_filename)
            code = files[own.co_filename].get((own.co_name, own.co_firstlineno))
            if code is not None and code.co_freevars == own.co_freevars:
                stack.callback(setattr, function, "__code__", own)
                function.__code__ = code
        yield


def from_surroundings(error: BaseException) -> bool:
    """Whether an exception is none that the model's answer can be the reason of."""
    if isinstance(error, _READING):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename.startswith("<") and "frozen" not in frame.filename for frame in frames):
        return False  # the answer itself was run as code
    return isinstance(error, _SURROUNDINGS) or type(error).__module__.startswith(_CLIENTS)


def from_reading(error: BaseException) -> bool:
    """Whether an exception is of a kind that reading an odd answer often raises, as no match of a pattern does."""
    return isinstance(error, _READING) or (isinstance(error, AttributeError) and "'NoneType'" in str(error))


def _hooked(file: str) -> dict[tuple[str, int], CodeType]:
    """The code with hooks of a file's functions that have any, by name and first line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given when the task was imported
        tree = _Hooks().visit(ast.parse(Path(file).read_bytes(), file))
        codes = [compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)]
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return {(code.co_name, code.co_firstlineno): code for code in codes if _has_hook(code)}


def _has_hook(code: CodeType) -> bool:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return _HOOK in code.co_names or any(map(_has_hook, inner))


class _Hooks(ast.NodeTransformer):
    """Puts the call into the handlers."""

    def visit_Try(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        if not all(map(_tidies, node.body)):
            for handler in node.handlers:
                if _broad(handler.type) and not isinstance(handler.body[-1], ast.Raise):
                    handler.body.insert(0, _call(handler, _gives_fixed(handler.body)))
        return node

    visit_TryStar = visit_Try

    def visit_With(self, node: ast.With) -> ast.AST:
        """``suppress`` is a handler as well."""
        self.generic_visit(node)
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        broad = any(_name(call) == "suppress" and any(map(_broad, call.args)) for call in calls)
        if broad and not all(map(_tidies, node.body)):
            body = [_call(node, False), ast.copy_location(ast.Raise(), node)]
            handler = ast.copy_location(ast.ExceptHandler(None, None, body), node)
            node.body = [ast.copy_location(ast.Try(node.body, [handler], [], []), node)]
        return node


def _call(where: ast.AST, fixed: bool) -> ast.Expr:
    call = ast.Expr(ast.Call(ast.Name(_HOOK, ast.Load()), [ast.Constant(fixed)], []))
    return ast.copy_location(call, where)


def _name(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def _broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(map(_broad, kind.elts))
    return kind is None or (isinstance(kind, ast.Name) and kind.id in _BROAD)


def _tidies(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and _name(call) in _TIDYING


def _gives_fixed(body: list[ast.stmt]) -> bool:
    """Whether a handler does nothing but return, or assign, a value that is written there."""
    given = [statement.value for statement in body if isinstance(statement, (ast.Assign, ast.Return))]
    silent = (ast.Assign, ast.Return, ast.Expr, ast.Continue)
    return bool(given) and all(isinstance(each, silent) for each in body) and all(map(_fixed, given))


def _fixed(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.List, ast.Tuple)):
        return all(map(_fixed, value.elts))
    if isinstance(value, ast.Dict):
        return any(map(_fixed, value.values)) or not value.values
    return value is None or isinstance(value, (ast.Constant, ast.UnaryOp))
