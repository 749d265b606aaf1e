"""Runs the ``rl-edit`` command as ``python -m rl_edit``.

It serves where the package is on the path but not installed, as in a submitted job.
"""

from __future__ import annotations

from rl_edit.cli import main

if __name__ == "__main__":
    main()
