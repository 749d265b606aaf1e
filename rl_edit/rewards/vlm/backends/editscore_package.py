"""Uses the installed ``editscore`` package for parity: its prompts, and its models as a transport.

Its composition of scores is not used, since it invents a score where an answer cannot be read.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from rl_edit.errors import InputError
from rl_edit.rewards.model_files import loading, require_model
from rl_edit.rewards.vlm.backends.transport import Question, Reply, Sampling

# The package's models are not safe for two threads.
_BUSY = threading.Lock()
# The package fixes these.
_TOP_P, _TOP_K, _MAX_TOKENS = 0.9, 20, 512
_MAX_IMAGES = 2


class Upstream(BaseModel):
    """One of the package's local models. They need a GPU, and torchvision for Qwen2.5-VL.

    Attributes:
        backbone: as the package calls it; ``*_vllm`` also needs vllm.
        path: base checkpoint.
        lora_path: the judge's LoRA. None for a merged checkpoint.
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

    def require_files(self) -> None:
        _package()
        require_model(self.path, reward=f"transport {self.kind}")
        if self.lora_path is None:
            return
        files = ("adapter_config.json", "adapter_model.safetensors")
        missing = [file for file in files if not (Path(self.lora_path) / file).is_file()]
        # An id of the hub has no directory here; the package downloads it.
        if missing and (Path(self.lora_path).is_dir() or self.lora_path.count("/") != 1):
            raise InputError(
                f"lora_path({self.lora_path!r}) of the judge has no {' and no '.join(missing)}. "
                "Give the directory of a PEFT LoRA, or leave it out for a merged checkpoint."
            )

    async def ask(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        return await asyncio.to_thread(self._ask_all, questions)

    def _ask_all(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        with _BUSY:
            return tuple(self._answer(question) for question in questions)

    def _answer(self, question: Question) -> Reply:
        sampling = question.sampling
        if sampling != Sampling(
            temperature=sampling.temperature,
            # The package fixes these.
            top_p=_TOP_P,
            top_k=_TOP_K,
            max_tokens=_MAX_TOKENS,
        ):
            raise InputError(
                f"The editscore package always samples with top_p {_TOP_P}, top_k {_TOP_K} and "
                f"max_tokens {_MAX_TOKENS}, got {sampling.top_p}, {sampling.top_k} and "
                f"{sampling.max_tokens}. Leave them at these values or use another transport."
            )
        if len(question.images) > _MAX_IMAGES:
            raise InputError(
                f"A question shows {len(question.images)} images and the editscore package takes "
                f"{_MAX_IMAGES}. Use another transport."
            )
        with loading(self.path):
            model = _model(self, sampling.temperature)
        began = time.perf_counter()
        images = [Image.fromarray(image.cpu().numpy()) for image in question.images]
        text = model.inference(model.prepare_input(images, question.prompt), seed=question.seed)
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
    """Returns the package's questions about consistency and about quality.

    The first has ``<instruction>`` in the place of the instruction.
    """
    judge = _package().EditScore(backbone="", score_range=score_range)
    return judge.SC_prompt, judge.PQ_prompt


def _package() -> Any:
    before = list(sys.path)
    try:
        import editscore
    except ImportError as error:
        raise InputError(
            f"The package editscore cannot be imported here ({error}), and its prompts and models "
            "are not copied here. Install it (pip install --no-deps editscore json-repair; its own "
            "models want qwen-vl-utils and torchvision too), or use 'prompt: ours'."
        ) from error
    finally:
        # On import the package puts a directory of its own in front.
        sys.path[:] = before
    return editscore
