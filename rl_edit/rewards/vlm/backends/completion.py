"""Reads what an OpenAI-compatible server sends: a completion, an error, or something else.

Nothing here reads scores. Servers differ in where they put an answer; all places are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rl_edit.rewards.vlm.backends.transport import Reply, Token, Usage, shortened

_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
# Some gateways on Windows put it before their JSON.
_BYTE_ORDER = "\ufeff"
_HTML = re.compile(r"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ServerError:
    """An error in the words of a server.

    Attributes:
        status: of HTTP, or the one inside a body that came with HTTP 200.
        message: its words, or a description of what came instead of any.
        parameter: the part of the request it names as wrong; "" when it names none in a field.
        worded: whether the server explained the error in JSON.
        wait_s: pause that the body asks for.
    """

    status: int
    message: str
    parameter: str = ""
    worded: bool = False
    wait_s: float = 0.0


def read_error(status: int, text: str, content_type: str) -> ServerError:
    """Reads an error in any of the forms that servers use."""
    content = _json(text)
    # Google wraps its error into a list.
    if isinstance(content, list) and content:
        content = content[0]
    if not isinstance(content, dict):
        return ServerError(status=status, message=described(text, content_type))
    error = content.get("error", content)
    if not isinstance(error, dict):
        error = {**content, "message": error}
    message = error.get("message") or content.get("message") or content.get("detail")
    # OpenRouter puts the words of the server behind it there, and its own say nothing.
    behind = error.get("metadata")
    if isinstance(behind, dict) and behind.get("raw"):
        message = f"{message}: {behind['raw']}"
    parameter = error.get("param")
    # FastAPI lists one entry for each wrong field, with the way to it.
    if isinstance(message, list) and message and isinstance(message[0], dict):
        way = message[0].get("loc")
        parameter = str(way[-1]) if isinstance(way, list) and way else ""
        message = "; ".join(
            f"{entry.get('loc')}: {entry.get('msg')}"
            for entry in message
            if isinstance(entry, dict)
        )
    wait_s = content.get("estimated_time")
    return ServerError(
        status=status,
        message=str(message) if message else shortened(text),
        parameter=parameter if isinstance(parameter, str) else "",
        worded=bool(message),
        wait_s=float(wait_s) if isinstance(wait_s, int | float) else 0.0,
    )


def error_in(text: str, content_type: str) -> ServerError | None:
    """Reads an error that was sent with HTTP 200; None when there is none."""
    content = _json(text)
    first = content[0] if isinstance(content, list) and content else content
    if not isinstance(first, dict) or not first.get("error") or first.get("choices"):
        return None
    error = first["error"]
    code = error.get("code") if isinstance(error, dict) else None
    code = int(code) if isinstance(code, int | str) and str(code).isdecimal() else 200
    return read_error(code if 400 <= code < 600 else 200, text, content_type)


def completion_of(text: str, content_type: str) -> Reply:
    """Reads the message of a chat completion."""
    try:
        content: Any = json.loads(text.lstrip(_BYTE_ORDER))
        choice = content["choices"][0]
        if choice.get("error"):
            error = read_error(200, json.dumps(choice), content_type)
            return Reply(status="unreachable", reason=f"error in the answer: {error.message}")
        message = choice["message"]
        refusal, finish = message.get("refusal"), choice.get("finish_reason")
        reply = Reply(
            text="\n".join(filter(str.strip, _texts(message))),
            thinking=_thinking(message),
            # Gateways to other APIs keep the words of those.
            finished=str(finish).lower() not in ("length", "max_tokens"),
            tokens=_tokens(choice),
            usage=_usage(content),
        )
    # A proxy may answer 200 with a page of its own.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Reply(
            status="unreachable",
            reason=f"the reply is no chat completion but {described(text, content_type)}",
        )
    if refusal or finish == "content_filter":
        return Reply(
            status="refused", reason=f"the judge refused: {shortened(str(refusal or finish))}"
        )
    return reply


def described(text: str, content_type: str) -> str:
    """Names what a body is that nothing can be read from."""
    kind = content_type.partition(";")[0].strip().lower()
    if not text.strip():
        return "an empty body"
    if _HTML.match(text) or kind == "text/html":
        title = _TITLE.search(text)
        words = shortened(title[1] if title else re.sub(r"<[^>]*>", " ", text))
        return f"an HTML page ({words}); is base_url right? It ends before /chat/completions"
    if kind == "text/event-stream" or text.startswith("data:"):
        return f"a stream of events, which is not read here: {shortened(text)}"
    # The usual type adds nothing to the words.
    return shortened(text) if kind in ("", "application/json") else f"{kind}: {shortened(text)}"


def _texts(message: dict[str, Any]) -> Iterator[str]:
    """Yields the texts that may hold the answer: the content and the arguments of tool calls."""
    yield _words(message.get("content"))
    calls = [call.get("function") for call in message.get("tool_calls") or ()]
    for call in (*calls, message.get("function_call")):
        if call:
            yield _words(call.get("arguments"))


def _words(content: Any) -> str:
    """Returns the text of a content in any form: a string, parts, or JSON that was parsed."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        # Without a separator: parts may divide an answer anywhere.
        return "".join(
            _words(part.get("text")) if isinstance(part, dict) else _words(part)
            for part in content
            if not _is_thinking(part)
        )
    return json.dumps(content) if isinstance(content, dict) else ""


def _thinking(message: dict[str, Any]) -> str:
    """Returns the thinking that stands in a field or in parts of its own."""
    content = message.get("content")
    parts = [part for part in content if _is_thinking(part)] if isinstance(content, list) else []
    return "\n".join(
        filter(
            None,
            (
                _words(message.get("reasoning_content") or message.get("reasoning")),
                *(_words(part.get("thinking") or part.get("text")) for part in parts),
            ),
        )
    )


def _is_thinking(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")


def _tokens(choice: dict[str, Any]) -> tuple[Token, ...]:
    spelled = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(
        Token(
            text=token["token"],
            alternatives=tuple(
                (other["token"], float(other["logprob"]))
                for other in token.get("top_logprobs") or ()
            ),
        )
        for token in spelled
    )


def _usage(content: dict[str, Any]) -> Usage | None:
    usage = content.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, answer, cost = (
        value if isinstance(value := usage.get(name), int | float) else None
        for name in ("prompt_tokens", "completion_tokens", "cost")
    )
    return Usage(prompt_tokens=int(prompt or 0), answer_tokens=int(answer or 0), cost=cost)


def _json(text: str) -> Any:
    try:
        return json.loads(text.lstrip(_BYTE_ORDER))
    except ValueError:
        return None
