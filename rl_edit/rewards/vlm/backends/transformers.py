"""A judge inside this process, on Transformers: for small models, CPUs and parity checks.

It takes one question at a time; serve a model for throughput. The processor is put together from
the checkpoint's tokenizer and image processor: the complete one needs torchvision for videos.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from rl_edit.rewards.model_files import loading, require_complete
from rl_edit.rewards.vlm.backends.constrained_decoding import Constraint, Form, Vocabulary
from rl_edit.rewards.vlm.backends.families import (
    IMAGE,
    Family,
    FamilyChoice,
    chat_text,
    family_of,
    require_judge,
)
from rl_edit.rewards.vlm.backends.transport import TOP_LOGPROBS, Question, Reply, Sampling, Token

# Two threads must not load the same model twice.
_LOADING = threading.Lock()


class Transformers(BaseModel):
    """Loads a model at the first question, once per process.

    Sampling follows the question; the checkpoint's own defaults are not used.

    Attributes:
        path: checkpoint directory or hub name of a complete model (``rl-edit merge-judge`` makes
            one of a base and a LoRA).
        family: "auto" reads it from the checkpoint.
        device: "auto" is the GPU where there is one.
        dtype: of the weights; "auto" is the checkpoint's own.
        json_schema: choose only among tokens that keep the answer in form and let it end within
            ``max_tokens``.
        timeout_s: of one answer; an answer that takes longer is given up between two tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["transformers"] = "transformers"
    path: str = Field(min_length=1)
    family: FamilyChoice = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    json_schema: bool = False
    timeout_s: float = Field(default=600.0, gt=0)

    offers_logprobs: ClassVar[bool] = True

    def require_files(self) -> None:
        require_judge(self.path, transport=self.kind)

    async def ask(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        return await asyncio.to_thread(self._answer_all, questions)

    def _answer_all(self, questions: Sequence[Question]) -> tuple[Reply, ...]:
        with _LOADING, loading(self.path):
            # Loaded outside the lock of the model, which only generation holds.
            judge = _loaded(self.path, self.device, self.dtype)
        with judge.lock:
            return tuple(self._answer(judge, question) for question in questions)

    def _answer(self, judge: _Judge, question: Question) -> Reply:
        from transformers import GenerationConfig

        started = time.perf_counter()
        family = judge.family if self.family == "auto" else self.family
        inputs = judge.inputs(question, family)
        prompt_tokens, max_tokens = inputs["input_ids"].shape[1], question.sampling.max_tokens
        config = GenerationConfig(
            **_drawn(question.sampling),
            max_new_tokens=max_tokens,
            max_time=self.timeout_s,
            eos_token_id=judge.ends,
            pad_token_id=judge.ends[0],
            return_dict_in_generate=True,
            output_logits=question.want_logprobs,
        )
        allowed = self._constraint(judge, question, prompt_tokens) if self.json_schema else None
        cuda = [judge.model.device] if judge.model.device.type == "cuda" else []
        # generate() draws from the generator of the process, which is restored for other users.
        with torch.random.fork_rng(devices=cuda), torch.inference_mode():
            torch.manual_seed(question.seed)
            output = judge.model.generate(
                **inputs, generation_config=config, prefix_allowed_tokens_fn=allowed
            )
        answer = output.sequences[0, prompt_tokens:].tolist()
        seconds = time.perf_counter() - started
        finished = answer[-1] in judge.ends
        # Neither an end token nor the token limit: max_time has stopped it.
        if not finished and len(answer) < max_tokens:
            reason = f"no answer within {self.timeout_s:g} s"
            return Reply(status="timeout", reason=reason, seconds=seconds)
        tokens = tuple(
            judge.token(token, logits[0])
            for token, logits in zip(answer, output.logits or (), strict=False)
        )
        text = judge.tokenizer.decode(answer, skip_special_tokens=True).strip()
        return Reply(text=text, finished=finished, tokens=tokens, seconds=seconds)

    def _constraint(self, judge: _Judge, question: Question, prompt_tokens: int) -> Constraint:
        return Constraint(
            _form(json.dumps(question.schema)),
            _vocabulary(judge),
            prompt_tokens=prompt_tokens,
            max_tokens=question.sampling.max_tokens,
            end=judge.ends[0],
        )


def _drawn(sampling: Sampling) -> dict[str, Any]:
    """Translates the settings of sampling; temperature 0 takes the likeliest token."""
    if sampling.temperature <= 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # 0 switches it off.
        "top_k": sampling.top_k or 0,
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class _Judge:
    """A loaded model.

    Attributes:
        ends: tokens that end an answer.
        lock: for one generation at a time.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    family: Family
    ends: list[int]
    lock: threading.Lock

    def inputs(self, question: Question, family: Family) -> dict[str, Any]:
        patches = self.image_processor(
            images=[image.cpu().numpy() for image in question.images], return_tensors="pt"
        )
        first, *others = chat_text(family, len(question.images), question.prompt).split(IMAGE)
        # An image takes one placeholder for each patch that reaches the language model.
        counts = (
            patches["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2
        ).tolist()
        text = first + "".join(
            IMAGE * count + after for count, after in zip(counts, others, strict=True)
        )
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        inputs = {
            "input_ids": ids["input_ids"],
            "attention_mask": ids["attention_mask"],
            **patches,
        }
        # From Transformers 5 on.
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            inputs["mm_token_type_ids"] = (
                ids["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE)
            ).long()
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def token(self, chosen: int, logits: torch.Tensor) -> Token:
        """Lists a token's likeliest alternatives under the model itself.

        That is before temperature, top-k, top-p and any constraint.
        """
        # In single precision: the model may run in half precision.
        logprobs = logits.float().log_softmax(dim=-1)
        likeliest = logprobs.topk(min(TOP_LOGPROBS, len(logprobs))).indices.tolist()
        texts = {
            token: self.tokenizer.decode([token]) for token in dict.fromkeys([chosen, *likeliest])
        }
        return Token(
            text=texts[chosen],
            alternatives=tuple((text, float(logprobs[token])) for token, text in texts.items()),
        )


@cache
def _loaded(path: str, device: str, dtype: str) -> _Judge:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    family = family_of(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Weights in any other format would have to be unpickled.
    model, report = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        # Refused below, by name.
        ignore_mismatched_sizes=True,
    )
    require_complete(path, report)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = (
        model.generation_config.eos_token_id
        if model.generation_config.eos_token_id is not None
        else tokenizer.eos_token_id
    )
    return _Judge(
        model=model,
        tokenizer=tokenizer,
        image_processor=AutoImageProcessor.from_pretrained(path),
        family=family,
        ends=[ends] if isinstance(ends, int) else list(ends),
        lock=threading.Lock(),
    )


@cache
def _vocabulary(judge: _Judge) -> Vocabulary:
    size = judge.model.get_input_embeddings().num_embeddings
    # Embeddings are padded to a round number, beyond which the tokenizer knows no token.
    known = len(judge.tokenizer)
    texts = judge.tokenizer.batch_decode(
        [[token] for token in range(min(size, known))], skip_special_tokens=True
    )
    return Vocabulary(texts)


@cache
def _form(schema: str) -> Form:
    return Form(json.loads(schema))
