"""Serves pages, libraries and one model to a browser on this machine: over the loopback interface alone, at a port the system picks.

Every answer carries the headers that isolate a page from other origins: without them browsers give WebAssembly no threads
(HTML standard, cross-origin isolation). Only what lies below the given places is served, wherever a path or a link points.
"""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import unquote

_TYPES = {
    ".html": "text/html",
    ".mjs": "text/javascript",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",  # a model is read anew every time it is loaded
    "X-Content-Type-Options": "nosniff",
}
_HOST = "127.0.0.1"


class PageServer:
    """`places`: the first part of a path, such as "model", -> the folder or file it stands for.

    >>> with PageServer({"page": Path("pages")}) as server:
    ...     server.origin + "/page/chat.html"
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        roots = {name: place.resolve() for name, place in places.items()}
        self._server = http.server.ThreadingHTTPServer((_HOST, 0), type("Handler", (_Handler,), {"roots": roots}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def origin(self) -> str:
        return f"http://{_HOST}:{self._server.server_address[1]}"

    def close(self) -> None:
        """Safe to call twice."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    roots: Mapping[str, Path]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

    def _answer(self, with_body: bool) -> None:
        # A page of another site reaches us under its own name (DNS rebinding): the model is none of its business.
        if self.headers.get("Host") != f"{_HOST}:{self.server.server_address[1]}":  # type: ignore[index]
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        file = _file_of(self.path, self.roots)
        if file is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with file.open("rb") as stream:
            self._head(HTTPStatus.OK, _TYPES.get(file.suffix, "application/octet-stream"), file.stat().st_size)
            if with_body:
                try:
                    shutil.copyfileobj(stream, self.wfile, 1 << 20)
                except (BrokenPipeError, ConnectionResetError):  # the page was closed meanwhile
                    self.close_connection = True

    def _refuse(self, status: HTTPStatus) -> None:
        self._head(status, "text/plain", 0)

    def _head(self, status: HTTPStatus, kind: str, length: int) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _file_of(path: str, roots: Mapping[str, Path]) -> Path | None:
    """The file that a request names; None where there is none, or where it lies outside its place."""
    try:
        parts = PurePosixPath(unquote(path.partition("?")[0], errors="strict")).parts
    except UnicodeDecodeError:
        return None
    if len(parts) < 2 or parts[0] != "/" or parts[1] not in roots or any("\0" in part or "\\" in part for part in parts):
        return None
    root = roots[parts[1]]
    file = root.joinpath(*parts[2:]).resolve()  # follows links, so that they too have to stay inside
    return file if file.is_file() and file.is_relative_to(root) else None
