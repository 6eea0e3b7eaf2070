"""An OpenAI-compatible server in this process, which misbehaves as it is told."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


def completion(text: str, **fields: Any) -> dict[str, Any]:
    """A chat completion that says ``text``; 100 prompt tokens and one a word."""
    return {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": len(text.split())},
        **fields,
    }


def picture_of(body: dict[str, Any]) -> Image.Image:
    """The first picture of a request."""
    url = next(part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def describe(body: dict[str, Any]) -> str:
    """A caption that depends on the picture and the prompt alone."""
    picture = picture_of(body)
    digest = hashlib.sha256(picture.tobytes() + str(picture.size).encode()).hexdigest()[:8]
    return f"A picture of {picture.size[0]} by {picture.size[1]} pixels, number {digest}."


@dataclass
class Reply:
    """What to send: a status, a body (JSON unless bytes), headers; ``hang_up`` breaks the connection off, ``pause``
    seconds pass between two bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False
    pause: float = 0.0


@dataclass
class FakeServer:
    """``requests`` are the bodies that arrived, ``headers`` their headers; ``answer`` makes the replies."""

    answer: Callable[[dict[str, Any], int], Reply | dict[str, Any] | str]
    models: tuple[str, ...] | None = ("tiny",)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self):
        self._lock, self._now = threading.Lock(), 0

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "GET":
            listed = {"data": [{"id": name} for name in self.models or ()]}
            return self._send(handler, Reply(404, {}) if self.models is None else Reply(200, listed))
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.answer(body, number)
        finally:
            with self._lock:
                self._now -= 1
        if isinstance(reply, str):
            reply = completion(reply)
        self._send(handler, reply if isinstance(reply, Reply) else Reply(200, reply))

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            handler.send_header(name, reply.headers.get(name, value))
        for name, value in reply.headers.items():
            if name not in ("Content-Type", "Content-Length"):
                handler.send_header(name, value)
        handler.end_headers()
        if reply.pause:
            for byte in data:
                handler.wfile.write(bytes([byte]))
                time.sleep(reply.pause)
            return
        handler.wfile.write(data)
        if reply.hang_up:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


@contextlib.contextmanager
def serving(server: FakeServer, port: int = 0) -> Iterator[FakeServer]:
    """The server on loopback for as long as the block lasts; it is gone from its port afterwards."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.handle(self)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    http = _Quiet(("127.0.0.1", port), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
