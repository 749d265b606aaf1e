"""A judge inside this process, on vLLM: a GPU of its own, and large batches.

Needs ``pip install vllm``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from rl_edit.errors import InputError
from rl_edit.rewards.model_files import require_model
from rl_edit.rewards.vlm.backends.families import FamilyChoice, chat_text, family_of, require_judge
from rl_edit.rewards.vlm.backends.transport import TOP_LOGPROBS, Question, Reply, Token

_NO_PACKAGE = (
    "The transport vllm needs the package vllm, which cannot be imported here ({error}). "
    "Install it where reward actors run (pip install vllm, Linux with CUDA), or serve the "
    "judge elsewhere and use openai."
)

# One engine per process, one call at a time.
_BUSY = threading.Lock()


class VLLM(BaseModel):
    """Loads a model at the first question, once per process.

    Attributes:
        path: checkpoint directory or hub name of a complete model (``rl-edit merge-judge`` makes
            one of a base and a LoRA).
        family: "auto" reads it from the checkpoint.
        json_schema: constrain the answer's form.
        dtype: of the weights. "auto" is vLLM's choice for the checkpoint.
        max_model_len: prompt, images and answer. Two images of 512 px and 512 words of answer fit
            1536, of 1024 px 4096.
        max_images: images a question may hold.
        tensor_parallel_size: GPUs that share one model.
        gpu_memory_utilization: share of a GPU's memory that vLLM may take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["vllm"] = "vllm"
    path: str = Field(min_length=1)
    family: FamilyChoice = "auto"
    json_schema: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(default=4096, ge=1)
    max_images: int = Field(default=3, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)

    offers_logprobs: ClassVar[bool] = True

    def require_files(self) -> None:
        if find_spec("vllm") is None:
            raise InputError(_NO_PACKAGE.format(error="no such module"))
        if self.family == "auto":
            require_judge(self.path, transport=self.kind)
        else:
            require_model(self.path, reward=f"transport {self.kind}")

    async def ask(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        return await asyncio.to_thread(self._ask_all, questions)

    def _ask_all(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        family = family_of(self.path) if self.family == "auto" else self.family
        prompts = [
            {
                "prompt": chat_text(family, len(question.images), question.prompt),
                "multi_modal_data": {
                    "image": [Image.fromarray(image.cpu().numpy()) for image in question.images]
                },
            }
            for question in questions
        ]
        # All questions in one call: the engine forms its batches itself.
        with _BUSY:
            engine = _engine(self)
            began = time.perf_counter()
            outputs = engine.generate(
                prompts, [self._sampling(question) for question in questions], use_tqdm=False
            )
        # Of the batch: a single answer's time cannot be separated from it.
        seconds = time.perf_counter() - began
        return tuple(_reply(output.outputs[0], seconds) for output in outputs)

    def _sampling(self, question: Question) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        sampling = question.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            max_tokens=sampling.max_tokens,
            seed=question.seed,
            # The default settings of vLLM refuse more than these.
            logprobs=TOP_LOGPROBS if question.want_logprobs else None,
            structured_outputs=StructuredOutputsParams(json=question.schema)
            if self.json_schema
            else None,
        )


@cache
def _engine(config: VLLM) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(_NO_PACKAGE.format(error=error)) from error
    return LLM(
        model=config.path,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        limit_mm_per_prompt={"image": config.max_images},
        # Questions about one image follow each other.
        enable_prefix_caching=True,
    )


def _reply(answer: Any, seconds: float) -> Reply:
    tokens = tuple(
        Token(
            text=places[chosen].decoded_token or "",
            alternatives=tuple(
                (place.decoded_token or "", float(place.logprob)) for place in places.values()
            ),
        )
        for chosen, places in zip(answer.token_ids, answer.logprobs or (), strict=False)
    )
    return Reply(
        text=answer.text.strip(),
        finished=answer.finish_reason != "length",
        tokens=tokens,
        seconds=seconds,
    )
