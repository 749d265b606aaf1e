"""Writes the request of a question in the form that a server takes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from rl_edit.rewards.vlm.backends.families import SYSTEM, Family, mark
from rl_edit.rewards.vlm.backends.server_limits import SYSTEM_ROLE, Limits
from rl_edit.rewards.vlm.backends.transport import TOP_LOGPROBS, Question

RGB = UInt8[Tensor, "height width 3"]
_WHITE = (255, 255, 255)


def request_body(
    question: Question,
    *,
    model: str,
    family: Family,
    json_schema: bool,
    limits: Limits,
    encode: Callable[[RGB], str],
) -> dict[str, Any]:
    """Writes a chat request: the images, then the text.

    Args:
        encode: makes the address of an image.
    """
    sampling = question.sampling
    limit = "max_completion_tokens" if limits.max_completion_tokens else "max_tokens"
    body: dict[str, Any] = {
        "model": model,
        "messages": _messages(question, family, limits, encode),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        limit: sampling.max_tokens,
        "seed": question.seed,
    }
    # OpenAI's own API refuses fields that it does not know.
    if sampling.top_k is not None:
        body["top_k"] = sampling.top_k
    if question.want_logprobs:
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if json_schema:
        schema = {"name": "scores", "strict": True, "schema": question.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {name: value for name, value in body.items() if name not in limits.omitted}


def data_url(image: RGB) -> str:
    """Encodes an image without loss, so that no compression artefact is scored."""
    return _address(Image.fromarray(image.cpu().numpy()))


def joined_url(images: Sequence[RGB]) -> str:
    """Encodes images side by side, separated by white bars."""
    parts = [Image.fromarray(image.cpu().numpy()) for image in images]
    height = max(part.height for part in parts)
    bar = max(4, height // 32)
    width = sum(part.width for part in parts) + bar * (len(parts) - 1)
    joined, left = Image.new("RGB", (width, height), _WHITE), 0
    for part in parts:
        joined.paste(part, (left, 0))
        left += part.width + bar
    return _address(joined)


def _messages(
    question: Question, family: Family, limits: Limits, encode: Callable[[RGB], str]
) -> list[dict[str, Any]]:
    system, prompt = SYSTEM[family], question.prompt
    if limits.max_images is not None and len(question.images) > limits.max_images:
        urls, prompt = [joined_url(question.images)], f"{_places(question)}\n{prompt}"
    else:
        urls = [encode(image) for image in question.images]
    if system and SYSTEM_ROLE in limits.omitted:
        system, prompt = "", f"{system}\n\n{prompt}"
    content: list[dict[str, Any]] = []
    for number, url in enumerate(urls, start=1):
        if image_mark := mark(family, number):
            content.append({"type": "text", "text": image_mark})
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": prompt})
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": content}]


def _places(question: Question) -> str:
    """Says where each image stands in the joined one."""
    count = len(question.images)
    labels = question.labels or tuple(f"image {number}" for number in range(1, count + 1))
    sides = ("left", "right") if count == 2 else tuple(f"part {n}" for n in range(1, count + 1))
    listed = "; ".join(
        f"{side} = image {number}, {label}"
        for number, (side, label) in enumerate(zip(sides, labels, strict=True), start=1)
    )
    return (
        f"You get one image that shows {count} images side by side, from left to right, with white "
        f"bars between them: {listed}. The text below numbers the images in this order."
    )


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
