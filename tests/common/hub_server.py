"""A stand-in for the Hugging Face hub on this machine: serves repositories from folders, and takes commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Attributes: ``repos`` (id -> folder), ``requests`` (method and path), ``sent`` (bytes by path), ``commits``."""

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: dict[str, dict[str, bytes]] = {}

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What points huggingface_hub here."""
        endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        return {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",
        }


@contextmanager
def serve(repos: dict[str, Path]) -> Iterator[HubServer]:
    """Run a server."""
    server = HubServer(repos)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """The few calls of the hub's API that fetching and pushing need."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Metadata of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Listings and files."""
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            folder = self._repo(match[1])
            if folder:
                siblings = [{"rfilename": name} for name in _names(folder)]
                self._json({"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            folder = self._repo(match[1])
            if folder:
                self._json(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": (folder / name).stat().st_size,
                            "oid": _oid(name),
                        }
                        for name in _names(folder)
                    ]
                )
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            folder = self._repo(match[1])
            if folder and (folder / match[2]).is_file():
                self._file(folder, match[2])
            elif folder:
                self._fail(404, "EntryNotFound")
        else:
            self._fail(404, "RepoNotFound")

    def do_POST(self) -> None:
        """New repositories and commits."""
        self.server.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            data = json.loads(body)
            self.server.created.append(data)
            self._json({"url": f"{self.server.endpoint}/{data.get('organization') or 'user'}/{data['name']}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.commits[match[1]] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self._json(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}",
                }
            )
        else:
            self._fail(404, "RepoNotFound")

    def _repo(self, name: str) -> Path | None:
        folder = self.server.repos.get(name)
        if folder is None:
            self._fail(
                404 if name != "closed/model" else 403,
                "GatedRepo" if name == "closed/model" else "RepoNotFound",
            )
        return folder

    def _file(self, folder: Path, name: str) -> None:
        data, status = (folder / name).read_bytes(), 200
        headers = {"ETag": f'"{_oid(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if self.command == "GET":
            self.server.sent[name] = self.server.sent.get(name, 0) + len(data)
        self._send(status, data, headers)

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()
