"""Errors that the command line turns into a single line and an exit code of their own."""

from __future__ import annotations


class ClusterUnreachable(RuntimeError):
    """No Ray cluster answers at the given address. Exit code 5."""


class ResourcesInfeasible(RuntimeError):
    """The cluster can never place what the run asks for. Exit code 4."""


class InputError(ValueError):
    """Bad input, exit code 2: the message names the value, why it matters, and what to do instead."""
