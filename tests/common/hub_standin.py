"""A hub on this machine: a web server that answers as the real one does, for tests up to the network's edge."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubStandIn:
    """Knows a few repositories by name; everything else is not there.

    Attributes:
        url: Where it listens.
        asked: Paths that were asked for.
        repositories: Status, error code and size of the files by ``kind/owner/name``.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.repositories: dict[str, tuple[int, str, int]] = {}
        standin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                standin.asked.append(self.path)
                parts = self.path.split("?")[0].removeprefix("/api/").split("/")
                status, code, size = standin.repositories.get("/".join(parts[:3]), (404, "RepoNotFound", 0))
                body = {"id": "/".join(parts[1:3]), "sha": "0" * 40, "tags": []}
                body["siblings"] = [{"rfilename": "data.bin", "size": size}]
                if status != 200:
                    body = {"error": code}
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if code:
                    self.send_header("X-Error-Code", code)
                    self.send_header("X-Error-Message", code)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
