"""Builds the questions for judges, and reads the numbers out of their answers.

Scores are comparable within a run. For published EditScore numbers, use the prompts of its package
(``prompt: upstream``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

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


class Unreadable(Exception):
    """Raised for an answer that holds no score. Another attempt may help."""


_QUOTES = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u201e": '"', "\u201f": '"', "\u2018": "'", "\u2019": "'"}
)


def scores_in(text: str, schema: dict[str, Any]) -> tuple[float, ...]:
    """Reads the numbers of an answer, in the schema's order, each within its bounds.

    Accepted are a code fence around the object, typographic quotes, and fractions in place of whole
    numbers.

    Raises:
        Unreadable: anything else. A number taken out of prose would be an invented one.
    """
    bare = _unfenced(text.strip())
    try:
        answer = _strict_json(bare)
    except ValueError:
        # Second, not first: typographic quotes inside a well-formed string are its content.
        try:
            answer = _strict_json(bare.translate(_QUOTES))
        except ValueError as error:
            raise Unreadable(f"the answer is no JSON object ({error})") from None
    return tuple(_numbers(answer, schema, "the answer"))


def _numbers(value: Any, schema: dict[str, Any], name: str) -> Iterator[float]:
    kind = schema["type"]
    if kind == "object":
        properties: dict[str, Any] = schema["properties"]
        if not isinstance(value, dict) or set(value) != set(properties):
            raise Unreadable(f"{name} is not an object of exactly {', '.join(properties)}")
        if _numeric(value, properties) != _numeric(properties, properties):
            # Judges that write in another order often mean another order.
            order = ", ".join(_numeric(properties, properties))
            raise Unreadable(f"the scores in {name} are not in the order {order}")
        for key, inner in properties.items():
            yield from _numbers(value[key], inner, f'"{key}"')
    elif kind == "array":
        if not isinstance(value, list) or len(value) != schema["minItems"]:
            raise Unreadable(f"{name} is not a list of {schema['minItems']}")
        for item in value:
            yield from _numbers(item, schema["items"], name)
    elif kind == "string":
        if not isinstance(value, str):
            raise Unreadable(f"{name} is not text")
    else:
        low, high = schema["minimum"], schema["maximum"]
        if (
            # A bool is an int in Python.
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise Unreadable(f"{name}: {value!r} is not a number in {low}..{high}")
        yield float(value)


def _numeric(keys: dict[str, Any], properties: dict[str, Any]) -> list[str]:
    return [key for key in keys if properties[key]["type"] != "string"]


def _strict_json(text: str) -> Any:
    # Python's JSON accepts NaN and Infinity, which are no scores.
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        # Python's JSON keeps the last of two equal keys, so the score would depend on their order.
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)


def _unfenced(text: str) -> str:
    # Only around the complete text: a fence within prose would be a guess.
    fenced = re.fullmatch(r"```[^\n]*\n(.*)```", text, re.DOTALL)
    return fenced[1].strip() if fenced else text
