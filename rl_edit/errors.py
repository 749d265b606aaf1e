"""The one error a user can cause. The command line turns it into a single line and exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message names the value, why it matters, and what to do instead."""
