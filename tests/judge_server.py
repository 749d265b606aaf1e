"""A judge's endpoint on loopback that speaks OpenAI's protocol, and what goes wrong with such
endpoints."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from rl_edit.rewards.vlm.backends.server_limits import LEARNT

Answer = tuple[int, bytes | None] | tuple[int, bytes | None, dict[str, str]]
"""Status, body and further headers; no body is a connection cut in the middle of one."""


@dataclass
class JudgeServer:
    """``reply`` decides, from the request and its number, what is sent; ``requests`` and
    ``headers`` keep what came. ``models`` are listed at ``/models``."""

    reply: Callable[[dict[str, Any], int], Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    delay_s: float = 0.0
    reply_headers: dict[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    busiest: int = 0
    url: str = ""
    _in_flight: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self._in_flight += 1
            self.busiest = max(self.busiest, self._in_flight)
            number = len(self.requests)
            self.requests.append({**body, "path": handler.path})
            self.headers.append(dict(handler.headers))
        time.sleep(self.delay_s)
        status, payload, *more = self.reply(body, number)
        with self._lock:
            self._in_flight -= 1
        cut = payload is None
        payload = b'{"choices": [' if payload is None else payload
        handler.send_response(status)
        headers = {"Content-Type": "application/json", **self.reply_headers, **dict(*more)}
        headers["Content-Length"] = str(len(payload) + (1000 if cut else 0))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)
        if cut:
            handler.close_connection = True

    def list_models(self, handler: BaseHTTPRequestHandler) -> None:
        payload = json.dumps({"data": [{"id": name} for name in self.models]}).encode()
        handler.send_response(200 if self.models else 404)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)


@contextlib.contextmanager
def serving(
    reply: Callable[[dict[str, Any], int], Answer], **options: Any
) -> Iterator[JudgeServer]:
    """A running server; ``url`` is its address."""
    judge = JudgeServer(reply=reply, **options)
    # A port may be that of an earlier server, of which something was learnt.
    LEARNT.clear()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                judge.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                # The client gave up first, which is what the timeout test is about.
                self.close_connection = True

        def do_GET(self) -> None:
            judge.list_models(self)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def completion(
    content: Any, *, tokens: Sequence[dict[str, float]] | None = None, **message: Any
) -> bytes:
    """A chat completion. ``tokens`` are its token log-probabilities: at each place the
    alternatives, what was said first."""
    finish = message.pop("finish_reason", "stop")
    choice: dict[str, Any] = {
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish,
    }
    if tokens is not None:
        listed = [
            [{"token": text, "logprob": math.log(chance)} for text, chance in place.items()]
            for place in tokens
        ]
        choice["logprobs"] = {"content": [{**place[0], "top_logprobs": place} for place in listed]}
    return json.dumps({"choices": [choice]}).encode()


def parts_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the user's turn is made of."""
    return list(body["messages"][-1]["content"])


def words_of(body: dict[str, Any]) -> str:
    return str(parts_of(body)[-1]["text"])


def images_of(body: dict[str, Any]) -> list[np.ndarray]:
    urls = [part["image_url"]["url"] for part in parts_of(body) if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls
    ]


def question_of(body: dict[str, Any]) -> str:
    """Which of EditScore's two questions a request asks."""
    return "SC" if "<instruction>" in words_of(body) else "PQ"


GOOD = {"SC": [20, 5], "PQ": [25, 20]}


def good_reply(body: dict[str, Any], number: int) -> Answer:
    """An answer to EditScore's questions that composes to 4."""
    return 200, completion(json.dumps({"reasoning": "fine", "score": GOOD[question_of(body)]}))


_TWO = json.dumps({"reasoning": "ok", "score": [10, 10]})
FAULTS: dict[str, tuple[Answer, str, str]] = {
    "server error": ((500, b"boom"), "invalid", "HTTP 500"),
    "too many requests": ((429, b"slow down"), "invalid", "HTTP 429"),
    "cut connection": ((200, None), "invalid", "no answer from the judge"),
    "not a completion": (
        (200, b"<html>hello</html>"),
        "invalid",
        r"no chat completion but an HTML page \(hello\)",
    ),
    "no choices": ((200, b'{"choices": []}'), "invalid", "no chat completion"),
    "truncated JSON": ((200, completion(_TWO[:-4])), "invalid", "no JSON object"),
    "stopped at max_tokens": (
        (200, completion(_TWO, finish_reason="length")),
        "invalid",
        r"cut off at max_tokens\(512\)",
    ),
    "single score": (
        (200, completion('{"reasoning": "", "score": [10]}')),
        "invalid",
        '"score" is not a list of 2',
    ),
    "three scores": (
        (200, completion('{"reasoning": "", "score": [10, 1, 1]}')),
        "invalid",
        '"score" is not a list of 2',
    ),
    "no score": (
        (200, completion('{"reasoning": ""}')),
        "invalid",
        'no JSON object with "score": it has reasoning',
    ),
    "two answers": (
        (200, completion('{"reasoning": "", "score": [1, 2], "score": [3, 4]}')),
        "invalid",
        "a key stands twice",
    ),
    "out of range": (
        (200, completion('{"reasoning": "", "score": [10, 26]}')),
        "invalid",
        r"26 is not a number in 0\.\.25",
    ),
    "negative": (
        (200, completion('{"reasoning": "", "score": [-1, 2]}')),
        "invalid",
        "-1 is not a number",
    ),
    "NaN": (
        (200, completion('{"reasoning": "", "score": [NaN, 2]}')),
        "invalid",
        "NaN is no number",
    ),
    "infinite": (
        (200, completion('{"reasoning": "", "score": [1e999, 2]}')),
        "invalid",
        "inf is not a number",
    ),
    "text scores": (
        (200, completion('{"reasoning": "", "score": ["ten", "10"]}')),
        "invalid",
        "is not a number",
    ),
    "true": (
        (200, completion('{"reasoning": "", "score": [true, 2]}')),
        "invalid",
        "True is not a number",
    ),
    "prose": (
        (200, completion("I would give it 20 and 21 out of 25.")),
        "invalid",
        "no JSON object",
    ),
    "refusal in words": (
        (200, completion("I'm sorry, I can't help with that.")),
        "invalid",
        "no JSON object",
    ),
    "refusal field": (
        (200, completion(None, refusal="not allowed")),
        "refused",
        "refused: not allowed",
    ),
    "content filter": (
        (200, completion("", finish_reason="content_filter")),
        "refused",
        "refused: content_filter",
    ),
    "empty": ((200, completion("  ")), "invalid", "no JSON object"),
    "no content": ((200, completion(None)), "invalid", "no JSON object"),
}
"""What an endpoint may answer, the status a score then has, and a pattern of the reason."""
