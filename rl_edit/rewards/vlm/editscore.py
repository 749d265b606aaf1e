"""EditScore (arXiv 2509.23909): two questions about an edit, two numbers for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar, Literal

from jaxtyping import UInt8
from torch import Tensor

from rl_edit.rewards.term import Sides
from rl_edit.rewards.vlm.backends.editscore_package import upstream_prompts
from rl_edit.rewards.vlm.judge_reward import JudgeQuestion, JudgeReward, mean_of
from rl_edit.rewards.vlm.prompts import consistency_question, pair_schema, quality_question
from rl_edit.types import EditTask, Score

_PAIR = ("the original (source)", "the edited image (result)")


def overall(sc: Sequence[float], pq: Sequence[float]) -> float:
    """Composes sub-scores: ``sqrt(min(sc) * min(pq))``, in their unit (EditScore, after VIEScore).

    Args:
        sc: semantic consistency: instruction followed, not over-edited.
        pq: perceptual quality: natural, free of artefacts.
    """
    if any(not math.isfinite(score) or score < 0 for score in (*sc, *pq)):
        raise ValueError(
            f"sub-scores must be finite and not negative, got SC {list(sc)} and PQ {list(pq)}"
        )
    # The weakest sub-score decides: a perfect image of the wrong edit is worth nothing.
    return math.sqrt(min(sc) * min(pq))


class EditScore(JudgeReward):
    """Scores ``sqrt(min(SC) * min(PQ))`` on 0..10, the mean over passes.

    One failed pass makes the candidate invalid.

    Attributes:
        prompt: "ours" is worded here after EditScore's criteria; "upstream" is that of the
            installed ``editscore`` package, word for word.
        pq_images: images of the quality question. EditScore's single and batch code differ here.
    """

    kind: Literal["editscore"] = "editscore"
    prompt: Literal["ours", "upstream"] = "ours"
    pq_images: Literal["edited_only", "both"] = "edited_only"

    responds_to: ClassVar[Sides] = "both"
    high: ClassVar[float] = 10.0
    num_questions: ClassVar[int] = 2

    def require_files(self) -> None:
        super().require_files()
        if self.prompt == "upstream":
            upstream_prompts(self.score_range)

    def questions(
        self, task: EditTask, edited: UInt8[Tensor, "height width 3"]
    ) -> tuple[JudgeQuestion, ...]:
        both = self.pq_images == "both"
        if self.prompt == "upstream":
            consistency, quality = upstream_prompts(self.score_range)
            # Not str.format: an instruction may contain braces.
            consistency = consistency.replace("<instruction>", task.instruction)
        else:
            consistency = consistency_question(task.instruction, self.score_range)
            quality = quality_question(self.score_range, both=both)
        # Both questions have answers of one form, which the package's prompts ask for in words.
        schema = pair_schema(self.score_range)
        return (
            JudgeQuestion(
                name="SC",
                images=(task.source, edited),
                labels=_PAIR,
                prompt=consistency,
                schema=schema,
            ),
            JudgeQuestion(
                name="PQ",
                images=(task.source, edited) if both else (edited,),
                labels=_PAIR if both else _PAIR[1:],
                prompt=quality,
                schema=schema,
            ),
        )

    def combined(self, passes: Sequence[Sequence[tuple[float, ...]]]) -> Score:
        """Averages over the passes.

        Components, each 0..10: ``prompt_following, consistency, naturalness, artefacts, SC, PQ``.
        """
        parts = [
            {
                "prompt_following": sc[0],
                "consistency": sc[1],
                "naturalness": pq[0],
                "artefacts": pq[1],
                "SC": min(sc),
                "PQ": min(pq),
            }
            for sc, pq in passes
        ]
        return Score(
            value=min(fmean(overall(sc, pq) for sc, pq in passes), self.high),
            components=mean_of(parts),
        )
