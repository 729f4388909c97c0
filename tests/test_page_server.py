"""The server of pages: isolating headers, nothing but its places, nobody but this machine."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelora.runtime.page_server import PageServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "inside"
    (inside / "js").mkdir(parents=True)
    (inside / "page.html").write_text("<!doctype html>")
    (inside / "js" / "a b.mjs").write_text("export {}")
    (inside / "graph.wasm").write_bytes(b"\0asm")
    (tmp_path / "secret.txt").write_text("secret")
    (inside / "way out").symlink_to(tmp_path / "secret.txt")
    return inside


@pytest.fixture
def server(folder: Path) -> Iterator[PageServer]:
    (folder.parent / "model.gguf").write_bytes(b"GGUF")
    with PageServer({"page": folder, "model": folder.parent / "model.gguf"}) as server:
        yield server


def ask(server: PageServer, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], bytes]:
    where = server.origin.removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or where)
    connection.endheaders()
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


def test_pages_are_isolated_and_typed(server: PageServer) -> None:
    for path, kind, body in (
        ("/page/page.html?x=1", "text/html", b"<!doctype html>"),
        ("/page/js/a%20b.mjs", "text/javascript", b"export {}"),
        ("/page/graph.wasm", "application/wasm", b"\0asm"),
        ("/model", "application/octet-stream", b"GGUF"),
    ):
        status, headers, found = ask(server, path)
        assert (status, headers["Content-Type"], found) == (200, kind, body)
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Content-Length"] == str(len(body))
    status, headers, found = ask(server, "/page/graph.wasm", "HEAD")
    assert (status, headers["Content-Length"], found) == (200, "4", b"")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/page",
        "/page/",
        "/page/absent.html",
        "/page/../secret.txt",
        "/page/%2e%2e/secret.txt",
        "/page/js/..%2f..%2f..%2fsecret.txt",
        "/page/..\\secret.txt",
        "/page/way%20out",
        "/page//etc/passwd",
        "//etc/passwd",
        "/../secret.txt",
        "/model/../secret.txt",
        "/model/secret.txt",
        "/secret.txt",
        "/page/%00",
        "/page/%ff",
    ],
)
def test_nothing_beside_its_places_is_served(server: PageServer, path: str) -> None:
    status, headers, body = ask(server, path)
    assert (status, body) == (404, b"")
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_pages_of_other_names_are_refused(server: PageServer) -> None:
    port = server.origin.rpartition(":")[2]
    assert ask(server, "/model", host=f"evil.example:{port}")[0] == 403
    assert ask(server, "/model", host="127.0.0.1")[0] == 403
    assert ask(server, "/model", method="POST")[0] == 501


def test_it_listens_on_the_loopback_interface_alone(server: PageServer) -> None:
    with PageServer({}) as other:
        assert server.origin != other.origin  # each at a port of its own
        for one in (server, other):
            assert one.origin.startswith("http://127.0.0.1:")
    port = int(server.origin.rpartition(":")[2])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


def test_closed_it_answers_no_more(folder: Path) -> None:
    server = PageServer({"page": folder})
    server.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(server.origin.rpartition(":")[2])), timeout=2):
        pass
