"""The ``editscore`` package itself, where it is installed: its prompts word for word, and its models as a transport, for parity.

Its composition of scores is not used: where an answer cannot be read it makes one up.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from rl_edit.errors import InputError
from rl_edit.rewards.vlm.backends.transport import Question, Reply, Sampling

_BUSY = threading.Lock()
_TOP_P, _TOP_K, _MAX_TOKENS = 0.9, 20, 512
_MAX_IMAGES = 2


class Upstream(BaseModel):
    """One of the package's local models. They need a GPU, and torchvision for Qwen2.5-VL.

    Attributes:
        backbone: as the package calls it; ``*_vllm`` also needs vllm.
        path: base checkpoint. ``lora_path``: the judge's LoRA; None for a merged checkpoint.
        max_model_len, tensor_parallel_size: of the vllm backbones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["editscore"] = "editscore"
    backbone: Literal["qwen25vl", "qwen25vl_vllm", "qwen3vl", "qwen3vl_vllm"]
    path: str = Field(min_length=1)
    lora_path: str | None = None
    max_model_len: int = Field(default=4096, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)

    offers_logprobs: ClassVar[bool] = False

    async def ask(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        return await asyncio.to_thread(self._answers, questions)

    def _answers(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        with _BUSY:
            return tuple(self._answer(question) for question in questions)

    def _answer(self, question: Question) -> Reply:
        sampling = question.sampling
        if sampling != Sampling(
            temperature=sampling.temperature, top_p=_TOP_P, top_k=_TOP_K, max_tokens=_MAX_TOKENS
        ):
            raise InputError(
                f"The editscore package always samples with top_p {_TOP_P}, top_k {_TOP_K} and max_tokens {_MAX_TOKENS}, got "
                f"{sampling.top_p}, {sampling.top_k} and {sampling.max_tokens}. Leave them at these values or use another transport."
            )
        if len(question.images) > _MAX_IMAGES:
            raise InputError(
                f"A question shows {len(question.images)} pictures and the editscore package takes {_MAX_IMAGES}. Use another transport."
            )
        model = _model(self, sampling.temperature)
        began = time.perf_counter()
        pictures = [Image.fromarray(image.cpu().numpy()) for image in question.images]
        text = model.inference(model.prepare_input(pictures, question.prompt), seed=question.seed)
        return Reply(text=text, seconds=time.perf_counter() - began)


@cache
def _model(config: Upstream, temperature: float) -> Any:
    return (
        _package()
        .EditScore(
            backbone=config.backbone,
            model_name_or_path=config.path,
            lora_path=config.lora_path,
            temperature=temperature,
            max_model_len=config.max_model_len,
            tensor_parallel_size=config.tensor_parallel_size,
        )
        .model
    )


@cache
def upstream_prompts(score_range: int) -> tuple[str, str]:
    """The package's two questions: consistency, with ``<instruction>`` where the instruction goes, and quality."""
    judge = _package().EditScore(backbone="", score_range=score_range)
    return judge.SC_prompt, judge.PQ_prompt


def _package() -> Any:
    before = list(sys.path)
    try:
        import editscore
    except ImportError as error:
        raise InputError(
            f"The package editscore cannot be imported here ({error}), and its prompts and models are not copied here. Install it "
            "(pip install --no-deps editscore json-repair; its own models want qwen-vl-utils and torchvision too), or use 'prompt: ours'."
        ) from error
    finally:
        sys.path[:] = before  # the package puts a directory of its own in front on import
    return editscore
