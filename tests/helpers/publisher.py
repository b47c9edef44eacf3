"""A publisher's server on the loopback interface, well or ill behaved, and a way to reach it by any name."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from better_attention.lab.data.download import Remote

HOST = "data.example"
CONTENT = bytes(range(256)) * 40  # 10,240 bytes, every value in it
Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request, answered by the publisher's next answer."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        publisher = self.server.publisher
        publisher.requests.append((self.headers["Host"] + self.path, self.headers.get("Range")))
        answer = publisher.answers.pop(0) if publisher.answers else whole
        answer(self)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send ``body``, all of it, with its length unless ``headers`` say otherwise."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        """Close the connection after this answer."""
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    publisher: Publisher

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what many of these tests are about."""


class Publisher:
    """The server, what it was asked, and what it will answer (the whole file, once the list is used up)."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, str | None]] = []
        self._server = Server(("127.0.0.1", 0), Request)
        self._server.publisher = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def use_tls(self, context: ssl.SSLContext) -> None:
        """From now on speak TLS, to whoever accepts the certificate."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def session(self) -> requests.Session:
        """A session whose https addresses, whatever their host, all lead to this server."""
        session = requests.Session()
        session.trust_env = False
        session.mount("https://", _Loopback(self.port))
        return session


class _Loopback(HTTPAdapter):
    """Sends what was meant for ``https://HOST/...`` to the server on this machine, without TLS."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        address = urlsplit(str(request.url))
        sent = request.copy()
        sent.headers["Host"] = address.netloc
        sent.url = f"http://127.0.0.1:{self._port}{address.path}"
        return super().send(sent, *args, **kwargs)


def remote(content: bytes = CONTENT, *, host: str = HOST, name: str = "numbers.bin") -> Remote:
    """The row that describes ``content`` rightly."""
    return Remote(
        url=f"https://{host}/files/{name}", name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest()
    )


def whole(request: Request) -> None:
    """As a good server answers: the file, or the rest of it where a range is asked."""
    asked = request.headers.get("Range")
    if asked is None:
        request.reply(200, CONTENT)
        return
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    place = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    request.reply(206, CONTENT[start:], Content_Range=place)


def serves(content: bytes, **headers: str) -> Answer:
    """All of ``content``, whatever was asked."""
    return lambda request: request.reply(200, content, **headers)


def breaks_after(count: int) -> Answer:
    """Promises the rest of the file, sends ``count`` bytes of it and hangs up."""

    def answer(request: Request) -> None:
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        headers = {"Content_Length": str(len(CONTENT) - start)}
        if asked:
            headers["Content_Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        request.reply(206 if asked else 200, CONTENT[start : start + count], **headers)
        request.hang_up()

    return answer


def without_length(content: bytes) -> Answer:
    """Sends ``content`` and closes the connection to say that this was all."""

    def answer(request: Request) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(content)
        request.hang_up()

    return answer


def redirects(location: str) -> Answer:
    """Sends the client elsewhere."""
    return lambda request: request.reply(302, Location=location)


def refuses(status: int) -> Answer:
    """An error page."""
    return lambda request: request.reply(status, b"<html>sorry</html>", Content_Type="text/html")
