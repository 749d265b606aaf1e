"""What code ran: package versions and the hash of our own sources, to compare machines and to sign
checkpoints."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "numpy", "safetensors")
SOURCES = ("rl_edit", "actors", "learner")


@cache
def code_sha256() -> str:
    """sha256 over the Python sources that are importable here, by name and content."""
    digest = hashlib.sha256()
    for package in SOURCES:
        found = importlib.util.find_spec(package)
        for root in sorted((found and found.submodule_search_locations) or ()):
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(
                    f"{package}/{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes()
                )
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that must agree between the machines of a run: Python, packages, our code."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return {**found, "rl-edit sources": code_sha256()[:12]}


def differences(nodes: dict[str, dict[str, str]], here: dict[str, str]) -> list[str]:
    """In words, what differs on which node; empty when all agree with ``here``."""
    return [
        f"{node} has {name} {there.get(name, 'missing')}, here is {expected}"
        for node, there in sorted(nodes.items())
        for name, expected in here.items()
        if there.get(name) != expected
    ]
