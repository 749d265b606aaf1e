"""Provenance of a run: package versions, and the hash of our sources.

Versions are compared between the machines of a run. The hash signs checkpoints.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "numpy", "safetensors")
SOURCES_NAME = "rl-edit sources"
SOURCES = ("rl_edit", "actors", "learner")


@cache
def code_sha256() -> str:
    """Hashes the Python sources that are importable here, by name and content."""
    digest = hashlib.sha256()
    for package in SOURCES:
        # Located, not imported: hashing the sources must not load a package.
        spec = importlib.util.find_spec(package)
        for root in sorted((spec and spec.submodule_search_locations) or ()):
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(
                    f"{package}/{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes()
                )
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions that must agree between the machines of a run.

    These are Python, packages, and our code.
    """
    by_name = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_name[name] = version(name)
        except PackageNotFoundError:
            by_name[name] = "missing"
    return {**by_name, SOURCES_NAME: code_sha256()[:12]}


PLACE = "place"


def node_versions() -> dict[str, str]:
    """Returns the versions of another machine, and the folder that its sources lie in."""
    return {**versions(), PLACE: str(Path(__file__).resolve().parent.parent)}


def differences(nodes: dict[str, dict[str, str]], here: dict[str, str]) -> list[str]:
    """Lists in words how each node differs from ``here``; empty when all agree."""
    return [
        f"{node} has {name} {there.get(name, 'missing')}{_place(name, there)}, here is {expected}"
        for node, there in sorted(nodes.items())
        for name, expected in here.items()
        if there.get(name) != expected
    ]


def _place(name: str, there: dict[str, str]) -> str:
    # Another folder may be imported by mistake, so the sources' own is named.
    return f" in {there[PLACE]}" if name == SOURCES_NAME and there.get(PLACE) else ""
