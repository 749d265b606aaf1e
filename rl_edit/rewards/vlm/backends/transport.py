"""What a judge is asked and what comes back, whoever runs the model. A transport carries words; it reads no score out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from jaxtyping import UInt8
from torch import Tensor

TOP_LOGPROBS = 20
"""Alternatives asked for at each token: the most that OpenAI's API and vLLM's default settings allow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the judge's words are drawn. ``top_k`` is no field of OpenAI's API: None leaves it out."""

    temperature: float
    top_p: float
    top_k: int | None
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """Pictures first, then words. Questions about the same pictures stand together, so that a server can reuse its prefix.

    Attributes:
        schema: form of the answer (JSON schema), for transports that can constrain it.
        want_logprobs: whether the answer needs the alternatives at each of its tokens.
    """

    images: tuple[UInt8[Tensor, "height width 3"], ...]
    prompt: str
    seed: int
    sampling: Sampling
    schema: dict[str, Any]
    want_logprobs: bool = False


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of an answer and what else could have stood there: (text, log-probability), itself among them."""

    text: str
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, or why there is none.

    Attributes:
        text: what the judge said; "" unless the status is ok.
        finished: whether it ended by itself rather than at the token limit.
        tokens: of the text, when the question wanted log-probabilities and the transport has them.
        status: "unreachable" is everything that kept an answer from coming, except a refusal and a missed deadline.
        reason: why there is no answer; "" when there is one.
        final: whether asking again cannot help, as with a wrong key or model name.
        wait_s: how long the server asked to be left alone.
        seconds: from asking to the answer.
    """

    text: str = ""
    finished: bool = True
    tokens: tuple[Token, ...] = ()
    status: Literal["ok", "timeout", "refused", "unreachable"] = "ok"
    reason: str = ""
    final: bool = False
    wait_s: float = 0.0
    seconds: float = 0.0


class Transport(Protocol):
    """Asks a model. One reply a question, in their order; a fault is a reply, an impossible configuration raises InputError.

    Attributes:
        offers_logprobs: whether answers can come with the alternatives at each token.
    """

    offers_logprobs: ClassVar[bool]

    async def ask(self, questions: Sequence[Question]) -> Sequence[Reply]: ...


def shortened(text: str) -> str:
    """The start of a text, on one line, for a reason."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."
