"""An HTTP server in this process that speaks OpenAI's chat completions, and misbehaves as told."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Answer = Callable[[np.ndarray, str], str]
"""(uint8 (H, W, 3), prompt) -> text."""


@dataclass
class Fault:
    """What the server does in place of an answer."""

    status: int = 200
    body: str | bytes = ""
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "reply"
    """reply, hang (says nothing), drip (a byte at a time), cut (closes within the body), reset"""


@dataclass
class Seen:
    """One request."""

    digest: str
    """of its body"""
    began: float
    payload: dict[str, Any]
    authorization: str | None
    answered: bool = False
    """whether a whole answer was sent"""


class ChatServer(ThreadingHTTPServer):
    """See the module. `faults` are used up first, one a request; then `answer` says what the model says."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer, delay_s: float = 0.0, faults: Sequence[Fault] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.delay_s, self.faults = answer, delay_s, list(faults)
        self.seen: list[Seen] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is none of the server's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen = Seen(
            hashlib.sha256(body).hexdigest()[:16], time.monotonic(), json.loads(body), self.headers["Authorization"]
        )
        with server.lock:
            server.seen.append(seen)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.faults.pop(0) if server.faults else None
        try:
            if fault is not None:
                self._misbehave(fault)
            elif self.path != "/v1/chat/completions":
                self._send(404, json.dumps({"error": {"message": f"no such path: {self.path}"}}))
            else:
                time.sleep(server.delay_s)
                self._send(200, completion(server.answer(*question_of(seen.payload)), seen.digest))
                seen.answered = True
        finally:
            with server.lock:
                server.in_flight -= 1

    def _misbehave(self, fault: Fault) -> None:
        if fault.kind == "hang":
            self.server.closing.wait(30)
            self.close_connection = True
        elif fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._send(fault.status, fault.body, fault.headers, fault.kind)

    def _send(self, status: int, body: str | bytes, headers: dict[str, str] | None = None, kind: str = "reply") -> None:
        data = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if kind == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        if kind == "drip":
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                if self.server.closing.wait(0.02):
                    return
        else:
            self.wfile.write(data)
        self.wfile.flush()


def completion(text: Any, digest: str = "0", **message: Any) -> str:
    """The protocol's answer; 100 tokens were read and 10 written."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps({"id": digest, "object": "chat.completion", "choices": [choice], "usage": usage})


def question_of(payload: dict[str, Any]) -> tuple[np.ndarray, str]:
    """(uint8 (H, W, 3), prompt) of a request."""
    (message,) = payload["messages"]
    prompt = next(part["text"] for part in message["content"] if part["type"] == "text")
    url = next(part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url")
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), prompt


@contextmanager
def serve(answer: Answer, *, delay_s: float = 0.0, faults: Sequence[Fault] = ()) -> Iterator[ChatServer]:
    """The server, till the block ends."""
    server = ChatServer(answer, delay_s, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
