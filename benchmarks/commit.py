"""The commit that the numbers of a benchmark come from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_name() -> str:
    """Names the commit of this tree, and says when the tree has changes beside it."""
    command = ["git", "describe", "--always", "--dirty=, with changes"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    # A copy of the sources has no history.
    return done.stdout.strip() or "unknown"
