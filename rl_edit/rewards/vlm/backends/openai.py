"""A judge behind an OpenAI-compatible endpoint, such as ``vllm serve``.

Requests go to the configured address and nowhere else.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import aiohttp
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.rewards.vlm.backends.families import SYSTEM, FamilyChoice, family_named, mark
from rl_edit.rewards.vlm.backends.transport import TOP_LOGPROBS, Question, Reply, Token, shortened


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
        timeout_s: of one request.
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

    async def ask(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        """Sends all questions, at most ``concurrency`` of them at a time."""
        key = self._key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        slots = asyncio.Semaphore(self.concurrency)
        # The source is in every question of a group: compressed once.
        urls = {
            id(image): data_url(image)
            for image in {id(i): i for q in questions for i in q.images}.values()
        }

        async def one(question: Question) -> Reply:
            async with slots:
                began = time.perf_counter()
                reply = await self._send(
                    session,
                    self._body(question, [urls[id(image)] for image in question.images]),
                    key,
                )
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

    def _body(self, question: Question, urls: Sequence[str]) -> dict[str, Any]:
        family = family_named(self.model) if self.family == "auto" else self.family
        content: list[dict[str, Any]] = []
        for number, url in enumerate(urls, start=1):
            if image_mark := mark(family, number):
                content.append({"type": "text", "text": image_mark})
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": question.prompt})
        system = [{"role": "system", "content": SYSTEM[family]}] if SYSTEM[family] else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": content}],
            "temperature": question.sampling.temperature,
            "top_p": question.sampling.top_p,
            "max_tokens": question.sampling.max_tokens,
            "seed": question.seed,
        }
        # OpenAI's own API refuses fields that it does not know.
        if question.sampling.top_k is not None:
            body["top_k"] = question.sampling.top_k
        if question.want_logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self.json_schema:
            schema = {"name": "scores", "strict": True, "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _send(
        self, session: aiohttp.ClientSession, body: dict[str, Any], key: str | None
    ) -> Reply:
        try:
            # A redirect would carry the key to another host.
            async with session.request(
                "POST", f"{self.base_url}/chat/completions", json=body, allow_redirects=False
            ) as response:
                text = await response.text(errors="replace")
                # Before anything is cut off: a part of the key would not be found again.
                text = text.replace(key, "***") if key else text
        # Before the next one: aiohttp's timeouts are client errors too.
        except TimeoutError:
            return Reply(status="timeout", reason=f"no answer within {self.timeout_s:g} s")
        except aiohttp.ClientError as error:
            return Reply(
                status="unreachable",
                reason=f"no answer from the judge: {type(error).__name__}: {error}",
            )
        if response.status != 200:
            # Too many requests and server errors pass; a wrong key or model does not.
            final = response.status < 500 and response.status not in (408, 409, 425, 429)
            reason = f"HTTP {response.status} from the judge: {shortened(text)}"
            return Reply(
                status="unreachable",
                reason=reason,
                final=final,
                wait_s=_seconds(response.headers.get("Retry-After")),
            )
        return _completion(text)


def data_url(image: UInt8[Tensor, "height width 3"]) -> str:
    """Encodes an image without loss, so that no compression artefact is scored."""
    buffer = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _completion(text: str) -> Reply:
    """Reads the message of a chat completion."""
    try:
        choice = json.loads(text)["choices"][0]
        message = choice["message"]
        content, refusal, finish = (
            message.get("content"),
            message.get("refusal"),
            choice.get("finish_reason"),
        )
        spelled = (choice.get("logprobs") or {}).get("content") or ()
        tokens = tuple(
            Token(
                text=token["token"],
                alternatives=tuple(
                    (other["token"], float(other["logprob"])) for other in token["top_logprobs"]
                ),
            )
            for token in spelled
        )
    # A proxy may answer 200 with a page of its own.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Reply(
            status="unreachable", reason=f"the reply is no chat completion: {shortened(text)}"
        )
    if refusal or finish == "content_filter":
        return Reply(
            status="refused", reason=f"the judge refused: {shortened(str(refusal or finish))}"
        )
    return Reply(
        text=content if isinstance(content, str) else "", finished=finish != "length", tokens=tokens
    )


def _seconds(header: str | None) -> float:
    """Reads a Retry-After header in seconds; 0 for none, or for a date."""
    try:
        seconds = float(header) if header else 0.0
    except ValueError:
        return 0.0
    # A server could ask for an endless pause.
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
