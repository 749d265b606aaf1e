"""Ways to reach a vision-language model. Questions and scores are the task of the rewards."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rl_edit.rewards.vlm.backends.editscore_package import Upstream
from rl_edit.rewards.vlm.backends.openai import OpenAI
from rl_edit.rewards.vlm.backends.transformers import Transformers
from rl_edit.rewards.vlm.backends.transport import Question, Reply, Sampling, Token, Transport
from rl_edit.rewards.vlm.backends.vllm import VLLM

__all__ = [
    "VLLM",
    "JudgeTransport",
    "OpenAI",
    "Question",
    "Reply",
    "Sampling",
    "Token",
    "Transformers",
    "Transport",
    "Upstream",
]

JudgeTransport = Annotated[OpenAI | Transformers | VLLM | Upstream, Field(discriminator="kind")]
