"""Instructions as Qwen-Image-Edit reads them: their limit, and their rows among the text.

The stock pipelines read a text of any length, though they document 1024 tokens as the most. Here
the limit is kept: what lies beyond it is cut, and said before a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from rl_edit.data.editor_text import TextReading
from rl_edit.errors import InputError

_IMAGE = "<|image_pad|>"
"""Token that the processor replaces by those of an image."""

_IMAGE_END = "<|vision_end|>"
"""Token before every instruction, in the templates of both pipelines."""


@dataclass(frozen=True, kw_only=True)
class QwenText:
    """The tokenizer of a pipeline with the longest instruction that is read.

    Attributes:
        tokenizer: a fast one, which knows where in the text its tokens lie.
        max_tokens: tokens of an instruction, without the template.
    """

    tokenizer: Any
    max_tokens: int

    def readable(self, instruction: str) -> str:
        """Returns the part of an instruction that is read.

        Raises:
            InputError: it holds the mark of an image.
        """
        if _IMAGE in instruction:
            raise InputError(
                f"the instruction {instruction[:60]!r} holds {_IMAGE}, which the editor takes for "
                "an image of its own: take it out"
            )
        offsets = self._offsets(instruction)
        if len(offsets) <= self.max_tokens:
            return instruction
        return instruction[: offsets[self.max_tokens][0]].rstrip()

    def read(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Counts the tokens of each instruction, and finds what is cut."""
        return tuple(self._reading(text) for text in texts)

    def _reading(self, text: str) -> TextReading:
        offsets = self._offsets(text)
        long = len(offsets) > self.max_tokens
        return TextReading(
            num_tokens=len(offsets),
            max_tokens=self.max_tokens,
            lost=text[offsets[self.max_tokens][0] :].strip() if long else "",
        )

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        tokens = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = tokens["offset_mapping"]
        return offsets

    def rows(self, instruction: str, after: str, count: int) -> Bool[Tensor, " text"]:
        """Marks an instruction's rows among the text encoder's states; all of them if it is empty.

        Args:
            after: template behind the instruction.
            count: rows that are left, the dropped ones of the template taken off.
        """
        # What stands before the end of an image changes no token behind it: it is left out here.
        start, end = len(_IMAGE_END), len(_IMAGE_END) + len(instruction)
        marked = torch.tensor(
            [
                # A token may join the last letter of the template with the first of the
                # instruction.
                first < end and last > start and last > first
                for first, last in self._offsets(_IMAGE_END + instruction + after)
            ]
        )
        # An empty instruction has no tokens of its own, and attention needs some.
        if not bool(marked.any()):
            return torch.ones(count, dtype=torch.bool)
        # The two agree at their ends: count from there.
        length = min(count, len(marked))
        rows = torch.zeros(count, dtype=torch.bool)
        rows[count - length :] = marked[len(marked) - length :]
        return rows
