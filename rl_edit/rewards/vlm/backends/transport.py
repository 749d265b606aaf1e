"""Records of a question and its reply. A transport carries text and reads no score out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from jaxtyping import UInt8
from torch import Tensor

# Alternatives per token: the largest number that OpenAI's API and vLLM's default settings allow.
TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of sampling. ``top_k`` is no field of OpenAI's API: None leaves it out."""

    temperature: float
    top_p: float
    top_k: int | None
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with images, which stand before its text.

    Questions about the same images are neighbours, so that a server can reuse its prefix.

    Attributes:
        labels: a few words for each image, which say where it stands when images are joined.
        schema: form of the answer (JSON schema), for transports that can constrain it.
        want_logprobs: whether the answer needs the alternatives at each of its tokens.
    """

    images: tuple[UInt8[Tensor, "height width 3"], ...]
    prompt: str
    seed: int
    sampling: Sampling
    schema: dict[str, Any]
    # Off unless needed: alternatives make a reply many times as large.
    want_logprobs: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of an answer.

    Attributes:
        alternatives: (text, log-probability) of the likeliest tokens at its place, itself included.
    """

    text: str
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a question and its answer, as the server counts them.

    Attributes:
        cost: in the server's currency; None where it names none.
    """

    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, or the reason why there is none.

    Attributes:
        text: the answer; "" unless the status is ok.
        thinking: what the server sent apart from the answer; it may be all there is.
        finished: whether it ended by itself rather than at the token limit.
        tokens: of the text, when the question has ``want_logprobs`` and the transport offers them.
        status: "unreachable" is every cause of a missing answer except a refusal and a missed
            deadline.
        reason: why there is no answer; "" when there is one.
        final: another attempt cannot help, as with a wrong key or model name.
        wait_s: pause that the server requested.
        seconds: from the request to the answer.
        usage: None where the server does not say.
    """

    text: str = ""
    thinking: str = ""
    finished: bool = True
    tokens: tuple[Token, ...] = ()
    status: Literal["ok", "timeout", "refused", "unreachable"] = "ok"
    reason: str = ""
    final: bool = False
    wait_s: float = 0.0
    seconds: float = 0.0
    usage: Usage | None = None

    @property
    def words(self) -> str:
        """The text to read: the answer, or the thinking where nothing else was sent."""
        # Servers without a parser for thinking put the answer among it.
        return self.text if self.text.strip() else self.thinking


class Transport(Protocol):
    """Puts questions to a model.

    Attributes:
        offers_logprobs: whether answers can come with the alternatives at each token.
    """

    offers_logprobs: ClassVar[bool]

    def require_files(self) -> None:
        """Refuses a transport whose model, package or key is not here, and loads nothing.

        Raises:
            InputError: with what is missing and the remedy.
        """
        ...

    async def ask(self, questions: Sequence[Question]) -> Sequence[Reply]:
        """Returns one reply per question, in their order.

        A fault is a reply; a configuration that cannot work raises InputError.
        """
        ...


def shortened(text: str) -> str:
    """Cuts a text to one line for a reason."""
    # Line breaks would split a line of the log.
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."
