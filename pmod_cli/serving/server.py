"""transformers' server around one model: where it listens, what it answers, and how it says no."""

from __future__ import annotations

import inspect
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving.server import build_server

from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.console import report_error
from pmod_cli.output.errors import PmodError
from pmod_cli.output.text import plain
from pmod_cli.serving.handler import ChatHandler
from pmod_cli.serving.pictures import PictureSources
from pmod_cli.serving.request import LARGEST

PATHS = ("/v1/chat/completions", "/v1/models", "/health")
"""Of transformers' server; the others load models by name, or need another kind of model."""

_LOCAL = ("127.0.0.1", "localhost")
_NO_OBJECT = "the body is no JSON object, or not sent as Content-Type: application/json"
_LAST_SECONDS = 5
"""How long answers under way may take after Ctrl-C."""


def make_app(model: VisionLanguageModel, name: str, sources: PictureSources, host: str) -> FastAPI:
    """The application that serves a model under a name to those who reach ``host``."""
    chat = ChatHandler(model, name, sources)
    # Handlers of other paths, of which each version of transformers has others.
    others = [key for key in inspect.signature(build_server).parameters if key.endswith("_handler")]
    handlers = dict.fromkeys(others) | {"chat_handler": chat}
    app: FastAPI = build_server(chat.model_manager, **handlers, generation_state=chat.generation_state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in PATHS]
    if host in _LOCAL:
        # Else any web page could reach it, by a name of its own for this machine.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL)
    app.add_middleware(_Guard)
    app.add_exception_handler(PmodError, lambda _, error: _refuse(400, str(error)))
    app.add_exception_handler(RequestValidationError, lambda _, __: _refuse(400, _NO_OBJECT))
    app.add_exception_handler(HTTPException, _told)
    return app


class _Guard:
    """Around everything: reads no more of a body than a request may have, and tells errors that no one foresaw."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, body, more = int(dict(scope["headers"]).get(b"content-length", 0)), bytearray(), True
        while more and size <= LARGEST:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            size, more = max(size, len(body)), message.get("more_body", False)
        if size > LARGEST:
            await _refuse(413, f"the body is larger than {LARGEST >> 20} MiB")(scope, receive, send)
            return
        begun, whole = False, [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive_whole, send_on)
        except Exception as error:
            report_error(error)
            if not begun:
                await _refuse(500, "the server failed over this request; its own log says why")(
                    scope, receive, send
                )


def _told(_: Any, error: Any) -> JSONResponse:
    return _refuse(error.status_code, str(error.detail))


def _refuse(status: int, message: str) -> JSONResponse:
    """In the form that OpenAI's clients read."""
    line = plain(" ".join(message.split()))
    kind = "server_error" if status == 500 else "invalid_request_error"
    # What is left of a body that is too large is not read.
    headers = {"Connection": "close"} if status == 413 else None
    return JSONResponse({"error": {"message": line, "type": kind}}, status, headers)


def bind(host: str, port: int) -> socket.socket:
    """Take an address (port 0: a free one), so that one that cannot be had is told before a model is loaded."""
    if not host:  # which would be every address
        raise PmodError("--host is empty", "127.0.0.1 is this machine, 0.0.0.0 all that reach it")
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError, TypeError, ValueError) as error:
        taken.close()
        why = getattr(error, "strerror", None) or error
        raise PmodError(
            f"cannot listen on {host}, port {port}: {why}",
            "--host and --port name another; --port 0 any that is free",
        ) from None
    return taken


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server that is quiet but for errors, which go to stderr; ``run(sockets=[...])`` lasts until a signal."""
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_LAST_SECONDS)
    return uvicorn.Server(config)
