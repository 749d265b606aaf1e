"""EditScore (arXiv 2509.23909): a vision-language model answers two questions about an edit with two numbers each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar, Literal

from jaxtyping import UInt8
from torch import Tensor

from rl_edit.rewards.term import Sides
from rl_edit.rewards.vlm.backends.editscore_package import upstream_prompts
from rl_edit.rewards.vlm.composition import overall
from rl_edit.rewards.vlm.judge_reward import Asked, JudgeReward, mean_of
from rl_edit.rewards.vlm.prompts import consistency_question, pair_schema, quality_question
from rl_edit.types import EditTask, Score


class EditScore(JudgeReward):
    """``sqrt(min(SC) * min(PQ))`` scaled to 0..10, the mean over passes. One failed pass makes the candidate invalid.

    Attributes:
        prompt: "ours" is worded here after EditScore's rubric; "upstream" is the installed ``editscore`` package's, word for word.
        pq_images: what the quality question shows. EditScore's own single and batch code differ in this.
    """

    kind: Literal["editscore"] = "editscore"
    prompt: Literal["ours", "upstream"] = "ours"
    pq_images: Literal["edited_only", "both"] = "edited_only"

    responds_to: ClassVar[Sides] = "both"
    high: ClassVar[float] = 10.0
    num_questions: ClassVar[int] = 2

    def questions(
        self, task: EditTask, edited: UInt8[Tensor, "height width 3"]
    ) -> tuple[Asked, ...]:
        both = self.pq_images == "both"
        if self.prompt == "upstream":
            consistency, quality = upstream_prompts(self.score_range)
            consistency = consistency.replace("<instruction>", task.instruction)
        else:
            consistency = consistency_question(task.instruction, self.score_range)
            quality = quality_question(self.score_range, both=both)
        schema = pair_schema(self.score_range)
        return (
            Asked(name="SC", images=(task.source, edited), prompt=consistency, schema=schema),
            Asked(
                name="PQ",
                images=(task.source, edited) if both else (edited,),
                prompt=quality,
                schema=schema,
            ),
        )

    def combined(self, passes: Sequence[Sequence[tuple[float, ...]]]) -> Score:
        """Components, each 0..10 and a mean over passes: ``prompt_following, consistency, naturalness, artefacts, SC, PQ``."""
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
