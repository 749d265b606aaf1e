"""The command line: one file per verb.

Errors become one readable line and an exit code. Nothing here imports a library, so that this
holds from the first import on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from rl_edit.cli import ending, output

# These libraries read their environment once, when they are imported; hence before the imports.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# OpenMP reads it once, when torch is imported. Threads that wait then sleep instead of spinning,
# which beside one busy program is the difference between 0.2 s and 2 s for the same work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Runs the verb and turns errors into one line and an exit code."""
    arguments, debug = ending.without_debug(sys.argv[1:])
    in_main = threading.current_thread() is threading.main_thread()
    before = _handlers() if in_main else {}
    output.open_closed()
    before_debug = os.environ.get("RL_EDIT_DEBUG")
    if debug:
        os.environ["RL_EDIT_DEBUG"] = "1"  # for what is imported later, such as Ray's part
    ending.quiet(debug=debug)
    ending.show_any_letter()
    try:
        _run(arguments, debug=debug)
    except SystemExit as ended:
        lost = output.flush()
        if lost is not None and not ended.code:
            ending.leave(lost, debug=debug)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # A program that calls this again did not give --debug.
        if before_debug is None:
            os.environ.pop("RL_EDIT_DEBUG", None)


def _run(arguments: list[str], *, debug: bool) -> None:
    try:
        ending.require_directory()
        try:
            from rl_edit.cli.verbs import app
        except Exception as error:
            ending.leave(ending.NotImportable(error), debug=debug)
        app(arguments)
    except (Exception, KeyboardInterrupt) as error:
        ending.leave(error, debug=debug)


def _handlers() -> dict[int, Any]:
    """Takes signals that end a process, unless a shell ignores them; returns what was there."""
    return {
        number: signal.signal(number, _terminated)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }


def _terminated(number: int, _: FrameType | None) -> None:
    """Ends the process as the signal does, after its clean-up."""
    # Not print: the signal may have come in the middle of one. The terminal may be closed.
    with contextlib.suppress(OSError):
        os.write(2, f"rl-edit: stopped by {signal.Signals(number).name}\n".encode())
    sys.exit(128 + number)
