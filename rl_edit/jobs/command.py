"""Reads a job's command: settings files to take along, modules, and paths it would miss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rl_edit.errors import InputError

ENDINGS = (".yaml", ".yml")
GIVEN = "given"
"""Folder in the package for settings files that lie above or beside the current directory."""

GROUPS = ("judge", "dataset")
"""Verbs that are followed by a second one."""

NO_PATHS = ("--preset", "--name", "--term")
"""Options whose values are names, also where a file is called the same."""

REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
"""A plugin or a reward function: ``module:name``."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command as the job runs it.

    Attributes:
        arguments: its words.
        configs: settings files, by their name in the package.
        modules: modules that settings name, in no order.
    """

    arguments: tuple[str, ...]
    configs: dict[str, Path]
    modules: frozenset[str]

    @classmethod
    def read(
        cls, arguments: Sequence[str], *, here: Path, present: Callable[[str], bool]
    ) -> Command:
        """Reads the words of a command.

        Args:
            here: the directory that relative paths are meant from.
            present: reports whether the package has a file or folder of a name already.

        Raises:
            InputError: a relative path that the job would not find.
        """
        words: list[str] = []
        configs: dict[str, Path] = {}
        modules: set[str] = set()
        previous = ""
        # A folder may well be called like a verb, "train" above all.
        verbs = 2 if arguments[0] in GROUPS else 1
        for word in arguments[verbs:]:
            key, _, value = word.partition("=") if "=" in word else ("", "", word)
            if (word.startswith("-") and not key) or previous in NO_PATHS or key in NO_PATHS:
                pass  # an option's own name, or a name
            elif not key and value.endswith(ENDINGS):
                name, path = _config(value, here)
                configs[name] = path
                settings = _settings(path)
                _require_found(settings, str(path), here, present)
                modules |= _modules(settings)
                word = name
            else:
                settings = list(_leaves(_parsed(value), key))
                _require_found(settings, f"'{word}'", here, present)
                modules |= _modules(settings)
            words.append(word)
            previous = word
        words = [*arguments[:verbs], *words]
        return cls(arguments=tuple(words), configs=configs, modules=frozenset(modules))


def _config(value: str, here: Path) -> tuple[str, Path]:
    """Returns a settings file and its name in the package."""
    path = Path(here, value)
    if not path.is_file():
        raise InputError(
            f"no config file at {value} (from {here}): the job takes settings files along, so "
            "they must be here."
        )
    inside = not Path(value).is_absolute() and ".." not in Path(value).parts
    return Path(value).as_posix() if inside else f"{GIVEN}/{path.name}", path


def _settings(path: Path) -> list[tuple[str, str]]:
    """Returns the texts of a settings file with their dotted keys."""
    try:
        return list(_leaves(yaml.safe_load(path.read_text(encoding="utf-8")), ""))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error


def _parsed(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:  # the job says what is wrong with it
        return value


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields every text of a mapping or list with its dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    elif isinstance(value, str):
        yield key, value


def _modules(settings: Sequence[tuple[str, str]]) -> set[str]:
    return {match[1] for _, text in settings if (match := REFERENCE.fullmatch(text))}


def _require_found(
    settings: Sequence[tuple[str, str]], origin: str, here: Path, present: Callable[[str], bool]
) -> None:
    """Refuses relative paths that exist here and not in the job's directory.

    A word such as "auto" is a path only where the setting is one, or where it has a slash.
    """
    for key, text in settings:
        path = Path(text)
        is_path = "/" in text or not key or key.endswith(("path", "dir", "file"))
        if not is_path or path.is_absolute() or "\n" in text or len(text) > 500:
            continue
        if (here / path).exists() and not present(path.as_posix()):
            raise InputError(
                f"{origin} names {text} by a relative path{f' ({key})' if key else ''}, and the "
                "job does not run in this directory. Give an absolute path that every node can "
                f"read, or take it along with --include {text}."
            )
