"""Reads a run from a preset or a YAML file.

Overrides have the form ``dotted.key=value``.

An unknown key is an error that suggests the nearest known one.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rl_edit.config.explain import explained
from rl_edit.config.renamed import modern, modern_override, print_once
from rl_edit.config.run import RunConfig
from rl_edit.errors import InputError, did_you_mean
from rl_edit.method.algorithms import METHODS
from rl_edit.run_directory import CONFIG_FILE, holds_run

Override = tuple[tuple[str, ...], Any]
"""The keys on the way to a setting, and its value."""


def presets() -> dict[str, str]:
    """Lists shipped presets by name, each with its first comment."""
    summaries = {}
    # Through importlib, because an installed package may lie in an archive.
    for entry in sorted(resources.files("rl_edit.presets").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            lines = itertools.takewhile(
                lambda line: line.startswith("#"), entry.read_text().splitlines()
            )
            summary = " ".join(line.removeprefix("#").strip() for line in lines)
            summaries[entry.name.removesuffix(".yaml")] = summary
    return summaries


def load_config(
    source: str | Path | None = None, *, preset: str | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Loads a run and applies ``dotted.key=value`` overrides.

    Renamed settings are read under their old names too; a hint goes to stderr.

    Raises:
        InputError: one line that names the key, the value and the remedy.
    """
    _require_one(source, preset)
    text, origin = _preset(preset) if preset is not None else _file(Path(str(source)))
    # The file first and the overrides after it: an override under a present name then takes the
    # place of the file's old one.
    raw = modern(_mapping(text, origin), note=print_once)
    changes = [parse_override(override) for override in overrides]
    return validated(_overridden(raw, changes), origin)


def validated(raw: Mapping[str, Any], origin: str) -> RunConfig:
    """The run of a raw mapping. Every problem becomes one line."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{origin}: {explained(error)}") from error


def parse_override(override: str) -> Override:
    """Splits ``dotted.key=value``; the value is YAML.

    Raises:
        InputError: it is not of this form.
    """
    key, separator, value = override.partition("=")
    key = key.strip()
    if not separator or not key or key.startswith("-"):
        raise InputError(
            f"override {override!r} is not of the form dotted.key=value, e.g. train.updates=50"
        )
    try:
        return tuple(key.split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML; quote it") from error


def _require_one(source: str | Path | None, preset: str | None) -> None:
    """Refuses no settings at all, and two sets of them."""
    if source is None and preset is None:
        raise InputError(
            "nothing says what to run: give a YAML file, or --preset NAME, for instance --preset "
            "tiny-rc-grpo, which needs no data and no GPU (all of them: rl-edit presets)"
        )
    if source is not None and preset is not None:
        raise InputError(
            f"two sets of settings are given, {source} and --preset {preset}: keep one. Settings "
            "of either are changed by KEY=VALUE, such as train.updates=50"
        )


def _preset(name: str) -> tuple[str, str]:
    """(text, origin) of a shipped preset."""
    known = presets()
    if name not in known:
        if Path(name).is_file():
            raise InputError(f"--preset {name} is a file: give it without --preset")
        hint = did_you_mean(name, known) or "."
        raise InputError(f"unknown preset {name!r}{hint} Known: {', '.join(known)}.")
    return (resources.files("rl_edit.presets") / f"{name}.yaml").read_text(), f"preset {name}"


def _file(path: Path) -> tuple[str, str]:
    """(text, origin) of a YAML file."""
    if not path.is_file():
        raise InputError(f"no config file at {path}: {_instead_of(path)}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as UTF-8 text ({error}): give a YAML file"
        ) from error


def _instead_of(path: Path) -> str:
    """Says what to give in place of a path that is no file."""
    if holds_run(path):
        return (
            f"it is the directory of a run. Continue it with rl-edit train --run-dir {path} "
            f"--resume; its settings are in {path / CONFIG_FILE}"
        )
    known = presets()
    if path.stem in known:
        return f"a preset has this name. Give it as --preset {path.stem}"
    if path.is_dir():
        return "it is a directory. Give a YAML file or --preset NAME (see: rl-edit presets)"
    files = [entry.name for end in ("yaml", "yml") for entry in path.parent.glob(f"*.{end}")]
    if near := difflib.get_close_matches(path.name, files, n=1):
        return f"did you mean {path.with_name(near[0])}?"
    if near := difflib.get_close_matches(path.stem, known, n=1):
        return f"did you mean --preset {near[0]}?"
    return "give an existing YAML file or --preset NAME (see: rl-edit presets)"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """Refuses a key given twice. Plain YAML would silently use the second."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1  # YAML counts lines from 0, editors from 1
            if key.value in seen:
                raise yaml.YAMLError(
                    f"{key.value!r} stands in line {seen[key.value]} and again in line {line}: "
                    "keep one of them"
                )
            seen[key.value] = line
        return dict(super().construct_mapping(node, deep=deep))


def _mapping(text: str, origin: str) -> dict[str, Any]:
    try:
        raw = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        tabs = [row for row, line in enumerate(text.splitlines(), 1) if line[:1] == "\t"]
        remedy = f". Line {tabs[0]} begins with a tab: use spaces" if tabs else ""
        raise InputError(
            f"{origin} is not valid YAML: {' '.join(str(error).split())}{remedy}"
        ) from error
    if raw is None:
        raise InputError(
            f"{origin} is empty: it must be a mapping of keys such as seed, editor, train"
        )
    if not isinstance(raw, dict):
        raise InputError(
            f"{origin} must be a mapping of keys such as seed, editor, train; "
            f"got {type(raw).__name__}"
        )
    return raw


def _overridden(raw: dict[str, Any], changes: Sequence[Override]) -> dict[str, Any]:
    """Applies all overrides, each under its present name."""
    # Before the other overrides, which adjust the new method.
    raw = _of_method(raw, changes)
    # Only the complete settings show that a section is a plugin, whose keys are not renamed.
    context = copy.deepcopy(raw)
    for path, value in changes:
        _set(context, path, value)
    result = copy.deepcopy(raw)
    renamed: dict[tuple[str, ...], tuple[str, ...]] = {}
    unchanged = set()
    for old, old_value in changes:
        path, value = modern_override(old, old_value, context=context, note=print_once)
        if path == old:
            unchanged.add(path)
        else:
            renamed[path] = old
        _set(result, path, value)
    # The same key twice is fine, the last one counts. Two names of one key are a mistake.
    for path in renamed.keys() & unchanged:
        raise InputError(
            f"{'.'.join(renamed[path])} is now {'.'.join(path)}, and both are given: "
            f"keep {'.'.join(path)}"
        )
    return result


def _set(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    node = raw
    for parent in path[:-1]:
        # Sections that the file leaves out, or sets to null, are created on the way.
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    # A copy: the value is set in two mappings, and each may be changed.
    node[path[-1]] = copy.deepcopy(value)


def _of_method(raw: dict[str, Any], changes: Sequence[Override]) -> dict[str, Any]:
    """Drops the file's adjustments when an override names another method.

    ``algorithm.name=OTHER`` asks for the other method as it is.
    """
    names = [value for path, value in changes if path == ("algorithm", "name")]
    algorithm = raw.get("algorithm")
    if (
        names
        and isinstance(algorithm, dict)
        and isinstance(names[-1], str)
        and names[-1] in METHODS
        and names[-1] != algorithm.get("name")
    ):
        return {**raw, "algorithm": {"name": names[-1]}}
    return raw
