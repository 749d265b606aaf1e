"""Renamed settings: the old name is read in this version, with a hint.

The table is applied to raw mappings before they are validated, to ``dotted.key=value`` overrides,
and to the settings that checkpoints store. Nothing else in the project knows an old name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rl_edit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RenamedKey:
    """A key of a section that has another name now.

    A ``*`` in ``section`` stands for every entry, such as every reward of a run.

    Example:
        ``RenamedKey(section=("train",), old="rows", new="states_per_forward")``
    """

    section: tuple[str, ...]
    old: str
    new: str

    @property
    def hint(self) -> str:
        """The old and the new dotted name, as one sentence."""
        return f"{_dotted(self.section, self.old)} is now {_dotted(self.section, self.new)}"

    def apply(self, settings: dict[str, Any], context: Mapping[str, Any]) -> bool:
        """Renames the key in ``settings``. Returns False when it is not there."""
        renamed = False
        for path, section in _sections(settings, self.section):
            if self.old not in section or _is_plugin(section, context, path):
                continue
            if self.new in section:
                raise _both(self.hint, _dotted(path, self.new))
            # The key stays in its place, so that a configuration keeps its order.
            entries = [(self.new if key == self.old else key, v) for key, v in section.items()]
            section.clear()
            section.update(entries)
            renamed = True
        return renamed


@dataclass(frozen=True, kw_only=True)
class RenamedKind:
    """A ``kind`` of a section that has another name now."""

    section: tuple[str, ...]
    old: str
    new: str

    @property
    def hint(self) -> str:
        return f"{_dotted(self.section, 'kind')} {self.old} is now {self.new}"

    def apply(self, settings: dict[str, Any], context: Mapping[str, Any]) -> bool:
        """Renames the kind in ``settings``. Returns False when another kind is there."""
        section = _section(settings, self.section)
        if section is None or section.get("kind") != self.old:
            return False
        section["kind"] = self.new  # the keys of the section are the same under both names
        return True


_NOISE = ("algorithm", "initial_noise")
_OBJECTIVE = ("algorithm", "objective")

RENAMED: tuple[RenamedKey | RenamedKind, ...] = (
    RenamedKey(section=("train",), old="rows", new="states_per_forward"),
    RenamedKey(section=("train",), old="passes", new="inner_epochs"),
    RenamedKey(section=("algorithm", "credit"), old="limit", new="advantage_clip"),
    RenamedKey(section=_NOISE, old="locality", new="background_pull"),
    RenamedKey(section=(*_NOISE, "start"), old="locality", new="background_pull"),
    RenamedKey(section=_NOISE, old="least", new="min_spread"),
    RenamedKey(section=_NOISE, old="most", new="max_spread"),
    RenamedKey(section=("algorithm", "acting"), old="most", new="max_decay"),
    # Settings of rl-edit find-masks, which are no section of a run.
    RenamedKey(section=("mask",), old="most", new="max_regions"),
    RenamedKey(section=("mask",), old="smallest", new="min_area"),
    RenamedKey(section=("mask",), old="largest", new="max_area"),
    RenamedKey(section=("rewards", "*"), old="readout", new="score_from"),
    RenamedKey(section=("rewards", "*", "of"), old="readout", new="score_from"),
    RenamedKind(section=_OBJECTIVE, old="background_anchored", new="background_regularised"),
    RenamedKind(
        section=(*_OBJECTIVE, "inner"), old="background_anchored", new="background_regularised"
    ),
)
"""Every renamed setting of this version."""


def silent(hint: str) -> None:
    """Says nothing: for settings that the user cannot edit, such as those of a checkpoint."""


# One process reads a configuration several times: its own, and those of run directories.
_printed: set[str] = set()


def print_once(hint: str) -> None:
    """Prints a hint to stderr, once per process and setting."""
    if hint not in _printed:
        _printed.add(hint)
        print(f"rl-edit: {hint}; the old name is read in this version only", file=sys.stderr)


def modern(
    settings: Mapping[str, Any],
    *,
    context: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = silent,
) -> dict[str, Any]:
    """Settings under their present names; what has no other name is unchanged.

    Args:
        settings: of a configuration file, or stored by an earlier version.
        context: the complete settings, where ``settings`` is a part of them. A plugin is
            recognised there; its keys are never renamed.
        note: receives a hint per renamed setting.

    Raises:
        InputError: an old and a new name of one setting are both given.
    """
    # A copy, because settings of a checkpoint are compared and shown as they were stored.
    result = copy.deepcopy(dict(settings))
    for renamed in RENAMED:
        if renamed.apply(result, context or {}):
            note(renamed.hint)
    return result


def modern_override(
    path: tuple[str, ...], value: Any, *, context: Mapping[str, Any], note: Callable[[str], None]
) -> tuple[tuple[str, ...], Any]:
    """The path and value of an override under present names."""
    # "train.rows=4" becomes {train: {rows: 4}}, which the table can be applied to.
    nested = value
    for part in reversed(path):
        nested = {part: nested}
    nested = modern(nested, context=context, note=note)  # a value may hold old names too
    # A rename changes one component and never the depth, so the path is read back step by step.
    names = []
    for _ in path:
        ((name, nested),) = nested.items()
        names.append(name)
    return tuple(names), nested


def modern_name(name: str) -> str:
    """A dotted name under its present name."""
    path, _ = modern_override(tuple(name.split(".")), None, context={}, note=print_once)
    return ".".join(path)


def _sections(
    settings: Mapping[str, Any], path: tuple[str, ...], before: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Lists the sections that a path with ``*`` matches, with their own paths."""
    if not path:
        return [(before, settings)] if isinstance(settings, dict) else []
    names = list(settings) if path[0] == "*" else [path[0]]
    return [
        match
        for name in names
        if isinstance(node := settings.get(name), Mapping)
        for match in _sections(node, path[1:], (*before, name))
    ]


def _section(settings: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    node: Any = settings
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, dict) else None


def _is_plugin(
    section: Mapping[str, Any], context: Mapping[str, Any], path: tuple[str, ...]
) -> bool:
    """Is the section a class of the user's, named ``module:Class``? Its keys are its own."""
    # An override of one key does not repeat the kind, which then stands in the complete settings.
    kind = section.get("kind", (_section(context, path) or {}).get("kind"))
    return isinstance(kind, str) and ":" in kind


def _dotted(section: tuple[str, ...], key: str) -> str:
    return ".".join([*section, key])


def _both(hint: str, new: str) -> InputError:
    return InputError(f"{hint}, and both are given: keep {new}")
