"""Turns what pydantic finds wrong into one sentence: the key, the value and the remedy."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from rl_edit.config.fields import known_keys, without_tags

_IN_YAML = {
    "Input should be a valid tuple": "must be a list, such as [one, two]",
    "Input should be a valid list": "must be a list, such as [one, two]",
    "Input should be a valid dictionary": "must be a mapping of keys",
}
"""Sentences of pydantic about Python's types, in words of YAML."""


def explained(error: ValidationError) -> str:
    """Every problem in one line; the first in full, two more in short."""
    problems = [_sentence(dict(item)) for item in error.errors(include_url=False)]
    if len(problems) == 1:
        return problems[0]
    return f"{problems[0]} (and {len(problems) - 1} more: {'; '.join(problems[1:3])})"


def _sentence(error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    shown = without_tags(location)
    name = ".".join(shown)
    # Three errors are about names and get a suggestion; all others are about a value.
    if error["type"] == "extra_forbidden":
        return _unknown_key(location, shown)
    if error["type"] == "union_tag_invalid":
        return _unknown_kind(error["ctx"], shown)
    if error["type"] == "union_tag_not_found":
        return f"{name} names no kind: add {name}.kind"
    message = error["msg"].removeprefix("Value error, ")
    message = _IN_YAML.get(message, message)
    # A key pasted into the wrong field of a reward must not reach a terminal or a log.
    if shown[:1] == ["rewards"]:
        return f"{name}: {message}"
    # A check of this project names its values itself.
    if not shown or error["type"] == "value_error":
        return f"{name}: {message}" if shown else message
    value = error.get("input")
    if not isinstance(value, str | int | float | bool | None):
        value = type(value).__name__
    return f"{name}: {message}, got {value!r}"


def _unknown_key(location: list[str], shown: list[str]) -> str:
    known = known_keys(location[:-1])
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    section = ".".join(shown[:-1])
    return f"unknown key {'.'.join(shown)!r}: {hint}" + (f" (in {section})" if section else "")


def _unknown_kind(context: dict[str, Any], shown: list[str]) -> str:
    # pydantic lists the tags as one string of quoted names.
    tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
    near = difflib.get_close_matches(str(context["tag"]), tags, n=1)
    key = ".".join([*shown, context["discriminator"].strip("'")])
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"{key}: unknown value {context['tag']!r}{hint} (known: {', '.join(tags)})"
