"""A judge behind an OpenAI-compatible endpoint, such as ``vllm serve``.

Requests go to the configured address and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rl_edit.errors import InputError
from rl_edit.rewards.vlm.backends.completion import (
    ServerError,
    completion_of,
    described,
    error_in,
    read_error,
)
from rl_edit.rewards.vlm.backends.families import Family, FamilyChoice, family_named
from rl_edit.rewards.vlm.backends.request import RGB, data_url, request_body
from rl_edit.rewards.vlm.backends.server_limits import (
    Limits,
    Server,
    learn,
    limits_of,
    takes_no_images,
)
from rl_edit.rewards.vlm.backends.transport import Question, Reply, shortened

# Parts of a request that the questions and their reading rest on.
_FIXED = frozenset({"model", "messages", "stream", "n"})
# Statuses of a server that is busy or still loads its model: it is waited for.
_BUSY = frozenset({429, 503, 529})
_NO_CREDIT = re.compile(r"insufficient_quota|exceeded your current quota|billing|credit", re.I)
# Some servers send the errors of their chat templates as 500.
_REFUSALS = frozenset({400, 422, 500, 501})
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0
_TOO_LONG = re.compile(
    r"context[ _](length|size|window)"
    r"|max_(completion_)?tokens.*(too large|less than|at most|exceed)"
)
_NO_MODEL = re.compile(r"(does|do) not exist|not found|unknown model|invalid model|no such", re.I)


class OpenAI(BaseModel):
    """Sends questions over HTTP, images as lossless PNG before the text.

    Attributes:
        base_url: up to and without ``/chat/completions``, e.g. ``http://127.0.0.1:8000/v1``.
        model: as the endpoint names it.
        family: how images are marked; "auto" goes by the model's name. EditScore-7B, -32B and -72B
            are Qwen2.5-VL.
        api_key_env, api_key_file: environment variable or file with the key. The key itself never
            enters a config or a log.
        json_schema: have the endpoint constrain the answer's form.
        extra_body: further fields of every request, by name, as the server documents them. They
            replace those of the same name and are written to logs: no key belongs here.
        omit: fields to leave out of every request, such as ``seed`` or ``top_k``; "system" puts the
            system text before the question. Fields that a server refuses are left out anyway.
        max_images: images a request may hold; more are joined side by side into one. None waits
            for the server to refuse them.
        timeout_s: of one request, with all waiting for a server that is busy or loads its model.
        concurrency: requests in flight from one scoring call, which has one for each candidate,
            question and pass. Below their number a group takes several times the judge's latency.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    kind: Literal["openai"] = "openai"
    base_url: str
    model: str = Field(min_length=1)
    family: FamilyChoice = "auto"
    api_key_env: str | None = None
    api_key_file: str | None = None
    json_schema: bool = False
    extra_body: dict[str, Any] = Field(default_factory=dict)
    omit: tuple[str, ...] = ()
    max_images: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=120.0, gt=0)
    concurrency: int = Field(default=32, ge=1)

    offers_logprobs: ClassVar[bool] = True

    @field_validator("base_url")
    @classmethod
    def _is_an_endpoint(cls, base_url: str) -> str:
        # Checked at validation: the address goes into config.yaml and every log.
        parts = urlsplit(base_url)
        if parts.username or parts.password or parts.query:
            raise InputError(
                "base_url carries a user, a password or a query, which would be written to every "
                "log. Use api_key_env or api_key_file."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"base_url({base_url!r}) is not an address to ask. Write it as http://HOST:PORT/v1."
            )
        return base_url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not name.isidentifier():
            # Not repeated: whoever puts a key here should not find it in the log as well.
            raise InputError(
                "api_key_env is not the name of an environment variable. Put the key into a "
                "variable and give its name."
            )
        return name

    @model_validator(mode="after")
    def _one_key(self) -> OpenAI:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise InputError(
                "api_key_env and api_key_file are both set, so which key is sent would be a guess. "
                "Keep one."
            )
        return self

    @field_validator("extra_body", "omit")
    @classmethod
    def _leaves_the_question(cls, names: Any) -> Any:
        if fixed := sorted(_FIXED & set(names)):
            raise InputError(
                f"{fixed[0]!r} stands in extra_body or omit, but questions and the reading of "
                "answers rest on it. Take it out."
            )
        return names

    @property
    def server(self) -> Server:
        """Names what limits are learnt for."""
        declared = Limits(omitted=frozenset(self.omit), max_images=self.max_images)
        return Server(base_url=self.base_url, model=self.model, declared=declared)

    def notes(self) -> tuple[str, ...]:
        """Says what is asked otherwise than configured, because the server refused it."""
        return limits_of(self.server).notes

    def require_files(self) -> None:
        self._key()

    async def ask(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        """Sends all questions, at most ``concurrency`` of them at a time."""
        key = self._key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # An exchange has its own limit, which waiting counts towards.
        timeout = aiohttp.ClientTimeout(total=None)
        slots = asyncio.Semaphore(self.concurrency)
        urls: dict[int, str] = {}

        def encode(image: RGB) -> str:
            # The source is in every question of a group: compressed once.
            return urls.get(id(image)) or urls.setdefault(id(image), data_url(image))

        async def one(question: Question) -> Reply:
            async with slots:
                began = time.perf_counter()
                reply = await _Exchange(
                    transport=self, session=session, key=key, question=question, encode=encode
                ).reply()
                return replace(reply, seconds=time.perf_counter() - began)

        # The semaphore is the one limit on requests in flight: the connector must not queue.
        async with aiohttp.ClientSession(
            headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            return tuple(await asyncio.gather(*(one(question) for question in questions)))

    def _key(self) -> str | None:
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            where, remedy = (
                f"The environment variable {self.api_key_env} is not set here",
                "Set it for reward actors.",
            )
        elif self.api_key_file is not None:
            path = Path(self.api_key_file)
            # Read at every call: a key may be renewed while a run goes on.
            key = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
            where, remedy = (
                f"The key file {path} is missing or empty here",
                "Put it on every machine that runs reward actors.",
            )
        else:
            return None
        if not key:
            raise InputError(f"{where}, so the judge would refuse. {remedy}")
        return key

    @property
    def spoken_family(self) -> Family:
        """Returns the family that images are marked for."""
        return family_named(self.model) if self.family == "auto" else self.family


@dataclass(frozen=True, kw_only=True)
class _Received:
    """A body that came back, or why there is none."""

    status: int = 0
    text: str = ""
    content_type: str = ""
    retry_after: str | None = None
    location: str = ""
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class _Exchange:
    """One question, asked until it is answered, refused for good, or out of time."""

    transport: OpenAI
    session: aiohttp.ClientSession
    key: str | None
    question: Question
    encode: Callable[[RGB], str]

    async def reply(self) -> Reply:
        """Returns the answer, or why there is none, within ``timeout_s``."""
        seconds = self.transport.timeout_s
        busy: list[str] = []
        try:
            async with asyncio.timeout(seconds) as limit:
                return await self._reply(limit.when() or math.inf, busy)
        except TimeoutError:
            after = f", after waiting for {busy[-1]}" if busy else ""
            return Reply(status="timeout", reason=f"no answer within {seconds:g} s{after}")

    async def _reply(self, deadline: float, busy: list[str]) -> Reply:
        loop, server, pause_s = asyncio.get_running_loop(), self.transport.server, _FIRST_WAIT_S
        while True:
            limits = limits_of(server)
            body = self._body(limits)
            received = await self._request("POST", "/chat/completions", body)
            if received.failure or received.location:
                return _elsewhere(received)
            error = _error(received)
            if error is None:
                return completion_of(received.text, received.content_type)
            if error.status in _REFUSALS and learn(
                server, limits, error, body, len(self.question.images)
            ):
                continue
            if error.status not in _BUSY or _NO_CREDIT.search(error.message):
                return await self._failed(received.status, error, body)
            wait_s = _seconds(received.retry_after) or error.wait_s or pause_s
            # Without time for an answer after the wait there is nothing to wait for.
            if loop.time() + wait_s >= deadline:
                reason = (
                    f"{_named(received.status, error)} (it is busy or loads its model, and "
                    f"transport.timeout_s {self.transport.timeout_s:g} leaves no time to wait "
                    f"another {wait_s:g} s)"
                )
                return Reply(status="unreachable", reason=reason, wait_s=wait_s)
            busy.append(_named(received.status, error))
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_WAIT_S)

    def _body(self, limits: Limits) -> dict[str, Any]:
        body = request_body(
            self.question,
            model=self.transport.model,
            family=self.transport.spoken_family,
            json_schema=self.transport.json_schema,
            limits=limits,
            encode=self.encode,
        )
        return body | self.transport.extra_body

    async def _request(self, method: str, path: str, body: Any = None) -> _Received:
        try:
            # A redirect would carry the key to another host.
            async with self.session.request(
                method, self.transport.base_url + path, json=body, allow_redirects=False
            ) as response:
                text = await response.text(errors="replace")
                # Before anything is cut off: a part of the key would not be found again.
                return _Received(
                    status=response.status,
                    text=text.replace(self.key, "***") if self.key else text,
                    content_type=response.headers.get("Content-Type", ""),
                    retry_after=response.headers.get("Retry-After"),
                    location=response.headers.get("Location", ""),
                )
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            words = str(error).replace(self.key, "***") if self.key else str(error)
            return _Received(failure=f"no answer from the judge: {type(error).__name__}: {words}")

    async def _failed(self, status: int, error: ServerError, body: dict[str, Any]) -> Reply:
        """Says what failed, and what to do where that is known."""
        # Server errors pass, and so does a request that came at a bad moment; others do not.
        passes = error.status >= 500 or error.status in (200, 408, 409, 425)
        return Reply(
            status="unreachable",
            reason=_named(status, error) + await self._remedy(error, body),
            final=not passes or takes_no_images(error.message),
        )

    async def _remedy(self, error: ServerError, body: dict[str, Any]) -> str:
        message = error.message.lower()
        if takes_no_images(message):
            return ". Its model sees no images, so it cannot judge an edit: serve another"
        if error.status in (401, 403) and self.key is None:
            return ". No key was sent; name one with api_key_env or api_key_file"
        if "model" in message and (error.status == 404 or _NO_MODEL.search(message)):
            return f". {await self._served()}; correct transport.model"
        if error.status == 404:
            where = f"Is base_url({self.transport.base_url}) right?"
            return f". {where} It ends before /chat/completions, usually in /v1"
        if error.status not in (400, 422):
            return ""
        if self.question.want_logprobs and "prob" in message:
            return ". 'score_from: expected' rests on logprobs: use 'score_from: text'"
        if _TOO_LONG.search(message):
            return ". Lower the term's max_tokens, or serve the model with a longer context"
        sent = ", ".join(sorted(body.keys() - _FIXED))
        return (
            f". Sent were {sent}; transport.omit leaves fields out, transport.extra_body adds some"
        )

    async def _served(self) -> str:
        """Lists the models of the server, for a reason."""
        listed = await self._request("GET", "/models")
        try:
            names = [str(model["id"]) for model in json.loads(listed.text)["data"]]
        except (ValueError, KeyError, TypeError):
            seen = listed.failure or described(listed.text, listed.content_type)
            return f"Its models cannot be listed ({shortened(seen)})"
        return f"It serves {shortened(', '.join(names)) or 'no model'}"


def _elsewhere(received: _Received) -> Reply:
    """Says that nothing answered at the address, or that it points to another."""
    if received.failure:
        return Reply(status="unreachable", reason=received.failure)
    reason = (
        f"HTTP {received.status} from the judge: it redirects to {shortened(received.location)}, "
        "which is not followed since it would be sent the key. Correct base_url"
    )
    return Reply(status="unreachable", reason=reason, final=True)


def _error(received: _Received) -> ServerError | None:
    if received.status == 200:
        return error_in(received.text, received.content_type)
    return read_error(received.status, received.text, received.content_type)


def _named(status: int, error: ServerError) -> str:
    """Writes an error for a reason."""
    code = f" with an error of code {error.status}" if error.status != status else ""
    error_in_200 = " with an error" if status == 200 and not code else code
    return f"HTTP {status}{error_in_200} from the judge: {shortened(error.message).rstrip('.')}"


def _seconds(header: str | None) -> float:
    """Reads a Retry-After header, in seconds or as a date; 0 for none."""
    try:
        seconds = float(header) if header else 0.0
    except ValueError:
        try:
            at = parsedate_to_datetime(header or "")
        except ValueError:
            return 0.0
        # A date without a zone is UTC (RFC 9110).
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        seconds = at.timestamp() - time.time()
    # A server could ask for an endless pause.
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
