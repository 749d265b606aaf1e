"""Writes a job's package for scripts: ``python -m rl_edit.jobs OUT [OPTIONS] -- VERB ...``.

The words of the job's command go to stdout, each ended by a zero byte; what is taken along and
what is left out goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rl_edit.errors import BAD_INPUT, InputError
from rl_edit.jobs import LIMIT_MIB, packed


def main() -> None:
    """Writes the package, or says in one line why not."""
    parser = argparse.ArgumentParser(prog="python -m rl_edit.jobs")
    parser.add_argument("out", type=Path, help="an empty folder")
    parser.add_argument("--here", type=Path, default=Path.cwd(), help="where paths are meant from")
    parser.add_argument("--include", action="append", default=[], help="a file or folder")
    parser.add_argument("--limit", type=int, default=LIMIT_MIB, help="MiB")
    parser.add_argument("arguments", nargs="+", help="the job's command, behind --")
    options = parser.parse_args()
    search = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        package = packed(
            options.arguments,
            here=options.here,
            include=options.include,
            search=[options.here / entry for entry in search],
            limit_mib=options.limit,
        )
        package.write(options.out)
    except (InputError, OSError) as error:
        print(f"submit: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    for line in package.lines():
        print(f"submit: {line}", file=sys.stderr)
    sys.stdout.write("".join(f"{word}\0" for word in package.arguments))


if __name__ == "__main__":
    main()
