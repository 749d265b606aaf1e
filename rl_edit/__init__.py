"""Reinforcement-learning post-training for instruction-guided image editors.

Importing this package puts the project's own ``actors`` and ``learner`` before any other modules
of these names. RL projects often have files called so, and an entry of PYTHONPATH or the working
directory comes before installed packages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

SIBLINGS = ("actors", "learner")


class SiblingFinder:
    """Finds the project's top-level packages in the folder that holds ``rl_edit``."""

    folder = str(Path(__file__).resolve().parent.parent)

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        """Returns the spec of a sibling; None leaves a name to the other finders."""
        return PathFinder.find_spec(name, [cls.folder]) if name in SIBLINGS else None


# At the front, because the finder of an editable install stands behind the one that reads sys.path.
sys.meta_path.insert(0, SiblingFinder)
