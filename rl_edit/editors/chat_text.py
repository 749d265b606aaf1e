"""Reads instructions that a chat template wraps, as a language model's tokenizer sees them.

Byte-level tokenizers know every text, so no word is unknown; what can be lost is its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from rl_edit.data.editor_text import TextReading

_MARK = "rl-edit-mark"


@dataclass(frozen=True, kw_only=True)
class ChatText:
    """A tokenizer with the template that a pipeline puts around an instruction.

    Attributes:
        tokenizer: a fast one, which knows where in the text its tokens lie.
        render: puts the template around an instruction.
        max_tokens: tokens that the pipeline reads, template included.
        special: does the tokenizer add its special tokens? Not where the template has them.
        padded: does the pipeline fill texts up to the limit?
        removed: text that the pipeline takes out of instructions; "" for nothing.
    """

    tokenizer: Any
    render: Callable[[str], str]
    max_tokens: int
    special: bool = True
    padded: bool = True
    removed: str = ""

    def rows(self, instruction: str) -> Bool[Tensor, " text"]:
        """Marks the instruction among the tokens that are read; all of them if it is empty."""
        text, start, end = self._placed(instruction)
        # With the arguments of the pipeline, so that rows and encodings belong together.
        tokens = self.tokenizer(
            text,
            padding="max_length" if self.padded else False,
            max_length=self.max_tokens,
            truncation=True,
            return_offsets_mapping=True,
            add_special_tokens=self.special,
        )
        marked = [
            # A token may join the last letter of the template with the first of the instruction.
            bool(read) and first < end and last > start and last > first
            for (first, last), read in zip(
                tokens["offset_mapping"], tokens["attention_mask"], strict=True
            )
        ]
        rows = torch.tensor(marked)
        return rows if any(marked) else torch.tensor(tokens["attention_mask"]).bool()

    def read(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Counts the tokens of each text with its template, and finds what is cut."""
        return tuple(self._reading(text) for text in texts)

    def _reading(self, instruction: str) -> TextReading:
        text, start, end = self._placed(instruction)
        tokens = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=self.special, verbose=False
        )
        offsets = tokens["offset_mapping"]
        # The first token that is not read begins there; the template before it is no loss.
        cut = max(offsets[self.max_tokens][0], start) if len(offsets) > self.max_tokens else end
        remark = (
            f"leave no room for the end of the editor's chat template within its "
            f"{self.max_tokens} tokens, so that is cut, as in the stock pipeline."
        )
        return TextReading(
            num_tokens=len(offsets),
            max_tokens=self.max_tokens,
            lost=text[cut:end].strip(),
            remark=remark if len(offsets) > self.max_tokens and not text[cut:end].strip() else "",
        )

    def _placed(self, instruction: str) -> tuple[str, int, int]:
        """Renders the template; the instruction's first letter and the one behind its last."""
        # An empty string is found between all letters.
        read = instruction.replace(self.removed, "") if self.removed else instruction
        text = self.render(read)
        # The template itself may hold the words of the instruction, such as "user".
        start = self.render(_MARK).index(_MARK)
        # A template that trims its text moves the first letter.
        begin = text.find(read.strip(), start)
        return text, begin, begin + len(read.strip())
