"""Walks the tree of settings: from a dotted name to the models and fields behind it.

Seams are unions of models with a ``kind`` each. A name alone does not say which member is meant,
so a walk may end at several models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from rl_edit.config.run import RunConfig


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Lists the pydantic models of an annotation, through unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    # X | Y has no typing origin of its own in every Python version, hence its name.
    if get_origin(annotation) in (Union, Annotated) or type(annotation).__name__ == "UnionType":
        return [model for part in get_args(annotation) for model in models_of(part)]
    return []


def tag_of(model: type[BaseModel]) -> str | None:
    """The ``kind`` that selects a model in its union. None when it has none."""
    kind = model.model_fields.get("kind")
    return None if kind is None else str(kind.default)


def child_of(annotation: Any, part: str) -> Any:
    """The annotation one step down. None when no model has such a field."""
    # The first member decides. Others that share a key hold some of the same models below it.
    for model in models_of(annotation):
        if part in model.model_fields:
            return model.model_fields[part].annotation
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def known_keys(location: Sequence[str]) -> list[str]:
    """Lists the keys that may stand at a location.

    The location may contain union tags.
    """
    current: Any = RunConfig
    for part in location:
        tagged = [model for model in models_of(current) if tag_of(model) == part]
        current = tagged[0] if tagged else child_of(current, part)
    return [key for model in models_of(current) for key in model.model_fields]


def without_tags(location: Sequence[str]) -> list[str]:
    """Removes union tags from a location.

    pydantic inserts them after a discriminated field.
    """
    current: Any = RunConfig
    names = []
    for part in location:
        members = models_of(current)
        tagged = [model for model in members if tag_of(model) == part]
        # A field may share its name with a tag; then it is the field.
        if tagged and not any(part in model.model_fields for model in members):
            current = tagged[0]
            continue
        names.append(part)
        current = child_of(current, part)
    return names


def is_default(name: str, settings: Mapping[str, Any]) -> bool:
    """Is a dotted setting of :meth:`RunConfig.identity` at its default?

    A run made before the setting existed did what the default does.

    Args:
        settings: the identity, in which ``kind`` selects the members of unions.
    """
    # Walk models and values side by side; the values say which member of a union is meant.
    *parents, last = name.split(".")
    annotation: Any = RunConfig
    node: Any = settings
    default_section: Any = None
    for part in parents:
        default_section = _default(annotation, part, node)
        annotation = child_of(annotation, part)
        node = node.get(part) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or last not in node:
        return False
    if last == "kind":
        # Every member has its own kind as default. Which of them is the default, the section says.
        return isinstance(default_section, Mapping) and default_section.get(last) == node[last]
    default = _default(annotation, last, node)
    return default is not PydanticUndefined and bool(default == node[last])


def _default(annotation: Any, key: str, node: Any) -> Any:
    """The default of a key, as JSON.

    The kind of a mapping selects the member of a union. Without a kind it is the first member that
    has the key.
    """
    kind = node.get("kind") if isinstance(node, Mapping) else None
    for model in models_of(annotation):
        if key in model.model_fields and (kind is None or tag_of(model) in (None, kind)):
            default = model.model_fields[key].get_default(call_default_factory=True)
            return default if default is PydanticUndefined else to_jsonable_python(default)
    return PydanticUndefined
