"""What every test shares: few threads, no network, shape-checked mathematics, and one lazily
started Ray cluster."""

from __future__ import annotations

import os
import secrets

# Before torch and ray are imported. Two busy processes with several threads each on two cores run
# several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Clusters of the tests ask for a token, and it is not that of whoever runs the tests.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# Ray runs its workers at nice 15: beside any other program the tests would wait for it.
os.environ.setdefault("RAY_worker_niceness", "0")
# A cluster of the person who runs the tests is never used by them.
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAY_API_SERVER_ADDRESS", None)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from commands import Command
from rl_edit.structure import MATHEMATICS

# Annotated shapes are checked at every call in tests; in production the annotations cost nothing.
# "plugins" has no shapes, and
# pydantic types that cannot be checked.
install_import_hook(
    [f"rl_edit.{name}" for name in MATHEMATICS if name != "method.plugins"], "beartype.beartype"
)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def small_editor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with an editor of the built-in architecture whose every layer answers: random
    weights, none of them zero.

    An untrained editor starts as the identity and has no gradient; the shipped one would tie every
    test to its weights.
    """
    from rl_edit.editors.tiny_families import write_tiny

    directory = tmp_path_factory.mktemp("editor")
    write_tiny("flux_kontext", directory)
    return str(directory)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster of two CPUs without a dashboard, started by the first test that asks and
    ended with the session."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 * 1024 * 1024,
    )
    yield
    ray.shutdown()


@pytest.fixture
def rl_edit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process."""
    from runs import command

    return lambda *arguments: command(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def trained(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one update."""
    from rl_edit.training import train
    from runs import small_config

    directory = tmp_path_factory.mktemp("runs") / "trained"
    train(
        small_config(small_editor, "train.updates=1", "train.learning_rate=0.1"),
        directory,
        resume=False,
    )
    return directory
