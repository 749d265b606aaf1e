"""Writes the reference of all settings, ``docs/config.md``, from the models.

Types, bounds and defaults come from the fields. The meaning, with the source of a default, comes
from ``Attributes`` in the docstrings.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from rl_edit.config.fields import models_of, tag_of
from rl_edit.config.run import RunConfig
from rl_edit.rewards.term import RewardTerm

INTRODUCTION = """\
# Settings

Every setting of a run, its type, its default and its meaning. `rl-edit show-config --reference`
writes this page from the code.

A run is a YAML file of these sections, or a shipped preset (`rl-edit presets`). A setting is
changed on the command line by its dotted name: `train.updates=50`. `rl-edit show-config` prints all
values of a run.

`None` in a description is `null` in YAML.

A part with a `kind` has the keys of that kind only. A named method (`algorithm.name`, see
[method.md](method.md)) brings its values for every part of `algorithm`. The defaults below are
those of a part that is given by its `kind`.

A setting that was renamed in this version is read under its old name too, in files, on the command
line and in run directories. A hint on stderr names the present one.
"""

_NAMES = {int: "int", float: "float", bool: "bool", str: "text", Path: "path", type(None): "null"}
_BOUNDS: dict[type, tuple[str, str]] = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}
# "name: text" or "name, other: text", four columns in.
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")


def reference() -> str:
    """The page as Markdown."""
    written: dict[type[BaseModel], str] = {}
    parts = [INTRODUCTION, *_section("The run", "", RunConfig, 2, written)]
    return "\n".join(parts)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Reads the text of each attribute from docstrings, bases included."""
    texts: dict[str, str] = {}
    # From the most general class down, so that a subclass may word an attribute anew.
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            texts |= _attributes(inspect.cleandoc(base.__doc__ or ""))
    return texts


def _attributes(docstring: str) -> dict[str, str]:
    _, _, block = docstring.partition("\nAttributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := _ENTRY.match(line):
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        # A deeper line goes on with the attribute, or attributes, that the last entry named.
        elif line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def _section(
    title: str,
    path: str,
    model: type[BaseModel],
    level: int,
    written: dict[type[BaseModel], str],
    common: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """Renders a model and the models below it.

    Args:
        path: dotted name of the section; "" for the run.
        written: titles of the models that have a section, to which others are linked.
        common: keys that another section describes.
    """
    # Before its fields are visited: a composite reward holds rewards, which would not end.
    written[model] = title
    keys = [key for key in model.model_fields if key not in common | {"kind"}]
    # Children come first, so that the table can link to those that are described elsewhere.
    children: list[str] = []
    for key in keys:
        children += _below(
            f"{path}.{key}" if path else key, model.model_fields[key], level, written
        )
    yield f"{'#' * level} {title}\n"
    yield textwrap.fill(_plain_text(_summary(model)), 100, break_on_hyphens=False) + "\n"
    if keys:
        texts = meanings(model)
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        for key in keys:
            field = model.model_fields[key]
            cells = (f"`{key}`", _type(field, written), _default(field), texts.get(key, ""))
            yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"
        yield ""
    yield from children


def _below(
    path: str, field: FieldInfo, level: int, written: dict[type[BaseModel], str]
) -> Iterator[str]:
    """Renders the models of a field that have no section yet."""
    annotation, common = field.annotation, frozenset[str]()
    # A mapping of plain values, such as transport.extra_body, has no section below it.
    if get_origin(annotation) is dict and models_of(get_args(annotation)[1]):
        # Rewards, under names that the user chooses.
        # Keys that every reward has are described once, in a section before the kinds.
        annotation, path = get_args(annotation)[1], f"{path}.NAME"
        common = frozenset(RewardTerm.model_fields)
        yield from _section(path, path, RewardTerm, level, written)
    members = models_of(annotation)
    for model in members:
        if model not in written:
            tag = tag_of(model)
            title = f"{path}: {tag}" if tag and len(members) > 1 else path
            yield from _section(title, path, model, min(level + 1, 4), written, common)


def _type(field: FieldInfo, written: dict[type[BaseModel], str]) -> str:
    annotation = field.annotation
    if get_origin(annotation) is dict:
        annotation = get_args(annotation)[1]
        if annotation is Any:
            return "mapping"
    # A part is described elsewhere on the page, so its type is a link.
    if members := models_of(annotation):
        links = [f"[{tag_of(m) or 'section'}](#{_slug(written[m])})" for m in members]
        return ", ".join(links)
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for kind, (name, sign) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    # The bound stands next to the number that it bounds: "int ≥ 1 or null".
    name, null, rest = _type_name(annotation).partition(" or null")
    return " ".join([name, *bounds]) + null + rest


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)} {_type_name(arguments[0])}"
    if origin in (tuple, frozenset):
        return f"list of {_type_name(arguments[0])}"
    return _NAMES.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    # JSON is YAML too, so a default can be copied into a file as it stands.
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return f"`{tag_of(type(default))}`" if tag_of(type(default)) else ""
    return f"`{json.dumps(to_jsonable_python(default))}`"


def _summary(model: type[BaseModel]) -> str:
    """The first paragraph of the docstring."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].split())


def _plain_text(text: str) -> str:
    """Docstring markup as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return _plain_text(text).replace("|", "\\|")


def _slug(title: str) -> str:
    """The anchor that a Markdown page gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
