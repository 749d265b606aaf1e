"""Finds the scores in a judge's answer, wherever they stand in it.

The scores are those of one JSON object with the keys that the question asked for. Thinking, fences,
greetings, trailing words and further keys are read past. Two objects with different scores are no
answer, and no number is ever taken out of prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

_QUOTES = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u201e": '"', "\u201f": '"', "\u2018": "'", "\u2019": "'"}
)
_TYPOGRAPHIC = "".join(map(chr, _QUOTES))
# Marks of the families that think before they answer: Qwen, DeepSeek, GLM and others; Magistral;
# Kimi; Seed. The last closing form begins the final channel of gpt-oss.
_OPENING = r"<think(?:ing)?>|<thought>|<reasoning>|\[THINK\]|◁think▷|<seed:think>"
_CLOSING = (
    r"</think(?:ing)?>|</thought>|</reasoning>|\[/THINK\]|◁/think▷|</seed:think>"
    r"|<\|channel\|>final<\|message\|>"
)
_QUOTED_NUMBER = re.compile(r" *-?[0-9]{1,9}(\.[0-9]{1,9})? *")
# A comma before a closing bracket, which Python and JavaScript allow and JSON does not.
_LAST_COMMA = re.compile(r",(?=\s*[}\]])")
_MARK = re.compile(f"(?P<opening>{_OPENING})|{_CLOSING}")


class Unreadable(Exception):
    """Raised for an answer that holds no score. Another attempt may help."""


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """The scores of an answer, in the schema's order.

    Attributes:
        start, end: of their JSON object in the text, or of the last one where equal ones repeat.
    """

    scores: tuple[float, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class _Response:
    """A JSON object of a text that looks like an answer, and what it holds.

    Attributes:
        problem: why it gives no scores; "" when it does.
    """

    start: int
    end: int
    scores: tuple[float, ...] = ()
    problem: str = ""


def scores_in(text: str, schema: dict[str, Any]) -> tuple[float, ...]:
    """Reads the numbers of an answer, in the schema's order, each within its bounds.

    Raises:
        Unreadable: as :func:`answer_in`.
    """
    return answer_in(text, schema).scores


def answer_in(text: str, schema: dict[str, Any]) -> ScoredAnswer:
    """Finds the one JSON object with scores, in an answer with or without thinking.

    A draft within the thinking counts only where the text holds nothing else. Accepted are
    typographic quotes, line breaks in strings, a comma too many at an end, numbers in quotes,
    and fractions in place of whole numbers.

    Raises:
        Unreadable: there is no such object, its numbers are out of bounds, or there are several
            with different numbers. A number taken out of prose would be an invented one.
    """
    visible = _without_thinking(text, schema)
    if not visible.strip():
        visible = text
    responses = list(_responses(visible, schema))
    if all(response.problem for response in responses):
        # Second, not first: typographic quotes inside a well-formed string are its content.
        mended = _LAST_COMMA.sub(" ", visible.translate(_QUOTES))
        straight = list(_responses(mended, schema))
        responses = responses if all(response.problem for response in straight) else straight
    if not responses:
        raise Unreadable("the answer holds no JSON object" + _without_scores(visible, schema))
    for response in responses:
        if response.problem:
            several = f"one of {len(responses)} in the answer cannot be used: "
            raise Unreadable(several * (len(responses) > 1) + response.problem)
    if len({response.scores for response in responses}) > 1:
        raise Unreadable(
            f"the answer holds {len(responses)} JSON objects with different scores, such as "
            f"{_listed(responses[0].scores)} and {_listed(responses[-1].scores)}, so which counts "
            "would be a guess"
        )
    last = responses[-1]
    return ScoredAnswer(scores=last.scores, start=last.start, end=last.end)


def thinking_in(text: str) -> bool:
    """Checks for marks of thinking in a text."""
    return _MARK.search(text) is not None


def _responses(text: str, schema: dict[str, Any]) -> Iterator[_Response]:
    """Yields every object of a text that has scores, or would have if it could be read."""
    begins = re.compile(rf"""\{{\s*["'{_TYPOGRAPHIC}]?({"|".join(schema["properties"])})\b""")
    for start, end, value in _objects(text):
        if isinstance(value, ValueError):
            # Objects within a broken answer may be quotations, so it counts as one that failed.
            if begins.match(text, start):
                problem = f"the answer holds no JSON object that can be read ({value})"
                yield _Response(start=start, end=end, problem=problem)
            continue
        for answer in _with_scores(value, _numeric(schema["properties"], schema["properties"])):
            try:
                scores = tuple(_numbers(answer, schema, "the answer"))
            except Unreadable as error:
                yield _Response(start=start, end=end, problem=str(error))
            else:
                yield _Response(start=start, end=end, scores=scores)


def _objects(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yields (start, end, value) of the outermost objects; an error where one cannot be read."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except RecursionError:
            # Every inner object would fail alike, at a quadratic cost.
            value, end = ValueError("it is nested too deeply"), len(text)
        except ValueError as error:
            value, end = error, start + 1
        yield start, end, value
        start = text.find("{", end)


def _with_scores(value: Any, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields the outermost dictionaries with one of the keys, such as inside a wrapping object."""
    if isinstance(value, dict) and not value.keys().isdisjoint(keys):
        yield value
        return
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inside:
        yield from _with_scores(item, keys)


def _without_thinking(text: str, schema: dict[str, Any]) -> str:
    """Blanks what stands between marks of thinking, or before a closing mark. Offsets stay."""
    strings = [
        range(start, end)
        for start, end, value in _objects(text)
        if any(True for _ in _with_scores(value, schema["properties"]))
    ]
    hidden: list[tuple[int, int]] = []
    opened: int | None = None
    for mark in _MARK.finditer(text):
        # A mark in the words of an answer ends no thinking.
        if any(mark.start() in span for span in strings):
            continue
        if mark["opening"] is None:
            # Templates may put the opening mark into the prompt, so it can be missing here.
            hidden.append((opened or 0, mark.end()))
            opened = None
        elif opened is None:
            opened = mark.start()
    if opened is not None:
        hidden.append((opened, len(text)))
    for start, end in hidden:
        text = text[:start] + " " * (end - start) + text[end:]
    return text


def _without_scores(text: str, schema: dict[str, Any]) -> str:
    """Says what the objects of a text hold instead of scores."""
    names = ", ".join(f'"{name}"' for name in _numeric(schema["properties"], schema["properties"]))
    for _, _, value in _objects(text):
        if isinstance(value, dict):
            keys = ", ".join(value) or "nothing"
            return f" with {names}: it has {keys}"
    return ""


def _numbers(value: Any, schema: dict[str, Any], name: str) -> Iterator[float]:
    kind = schema["type"]
    if kind == "object":
        properties: dict[str, Any] = schema["properties"]
        missing = [key for key in properties if key not in value]
        if missing:
            keys = ", ".join(f'"{key}"' for key in missing)
            raise Unreadable(f"{name} has no {keys}: it has {', '.join(value)}")
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
        # Many models quote their numbers.
        if isinstance(value, str) and _QUOTED_NUMBER.fullmatch(value):
            value = float(value)
        if (
            # A bool is an int in Python.
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise Unreadable(f"{name}: {value!r} is not a number in {low}..{high}")
        yield float(value)


def _numeric(keys: dict[str, Any], properties: dict[str, Any]) -> list[str]:
    return [key for key in keys if key in properties and properties[key]["type"] != "string"]


def _listed(scores: Sequence[float]) -> str:
    return "[" + ", ".join(f"{score:g}" for score in scores) + "]"


def _refused_constant(constant: str) -> NoReturn:
    # Python's JSON accepts NaN and Infinity, which are no scores.
    raise ValueError(f"{constant} is no number")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    # Python's JSON keeps the last of two equal keys, so the score would depend on their order.
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


# Not strict: judges write line breaks into their reasoning.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refused_constant, object_pairs_hook=_once)
