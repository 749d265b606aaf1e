"""Builds the questions for judges.

Scores are comparable within a run. For published EditScore numbers, use the prompts of its package
(``prompt: upstream``).
"""

from __future__ import annotations

from typing import Any

from rl_edit.rewards.vlm import prompt_texts as texts


def consistency_question(instruction: str, top: int) -> str:
    """Builds the question about source and edit, in that order; two scores."""
    return (texts.REQUEST + texts.CONSISTENCY + texts.RULES + texts.SUCCESS + texts.PAIR).format(
        instruction=instruction, top=top
    )


def quality_question(top: int, *, both: bool) -> str:
    """Builds the question about the edit, after its source if ``both``; two scores."""
    return (
        (texts.QUALITY_BOTH if both else texts.QUALITY_ONE) + texts.QUALITY + texts.PAIR
    ).format(top=top)


def region_question(instruction: str, shown: str, num_regions: int, top: int) -> str:
    """Builds the question about source, edit, and the images that ``shown`` describes.

    It asks for two scores per region, one for the background, and two for the complete image.
    """
    pairs = ", ".join(
        f"[<success {number}>, <preservation {number}>]" for number in range(1, num_regions + 1)
    )
    return (texts.REQUEST + texts.RULES + texts.REGIONS).format(
        instruction=instruction,
        shown=shown,
        count=num_regions,
        s="s" if num_regions > 1 else "",
        top=top,
        pairs=pairs,
    )


def pair_schema(top: int) -> dict[str, Any]:
    """Describes an answer of two scores."""
    return _object(reasoning={"type": "string"}, score=_list(_integer(top), 2))


def region_schema(num_regions: int, top: int) -> dict[str, Any]:
    """Describes an answer with a pair per region, the background, and a pair for the image."""
    pair = _list(_integer(top), 2)
    return _object(
        reasoning={"type": "string"},
        regions=_list(pair, num_regions),
        background=_integer(top),
        overall=pair,
    )


def _integer(top: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": top}


def _list(items: dict[str, Any], length: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
