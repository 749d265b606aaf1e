"""GPUs that Ray assigns, with Ray and without a GPU: a cluster that says it has two.

It takes their number from us, assigns ids and sets variables as it does with real ones. What CUDA
makes of them is checked by tests/test_gpus.py on machines that have some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent

SCRIPT = """
import asyncio, contextlib, json, os, sys
import ray
from actors import ray_executor
from actors.roles import WorkerSpec
from rl_edit.errors import ResourcesInfeasible

class Sees:
    def __init__(self, made=""):
        if made:
            open(made, "w").close()
    def ready(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")

def spec(gpus, *arguments, **more):
    with contextlib.suppress(TypeError):
        return WorkerSpec(process="rollout", make=Sees, arguments=arguments, gpus=gpus, **more)
    return WorkerSpec(process="rollout", make=Sees, arguments=arguments, gpus=gpus)

async def ask(spec, number, reports):
    executor = ray_executor.RayExecutor({"rollout": spec})
    with contextlib.suppress(AttributeError):
        executor._report = reports.append
    try:
        workers = [executor.spawn("rollout", slot) for slot in range(number)]
        return [await worker.call("ready") for worker in workers]
    finally:
        await executor.close()

def seen(spec, number, **variables):
    plain = ray_executor.environment
    ray_executor.environment = lambda gpus: {**variables, **plain(gpus)}
    reports = []
    try:
        return {
            "seen": asyncio.run(ask(spec, number, reports)),
            "assigned": [list(device.assigned) for device in reports],
            "indices": [list(device.positions) for device in reports],
            "noset": [device.noset for device in reports],
        }
    except ResourcesInfeasible as error:
        return {"refused": str(error)}
    finally:
        ray_executor.environment = plain

ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False,
         object_store_memory=100 * 1024 * 1024)
NOSET = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
ZERO = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
answers = {
    "set": seen(spec(1, idle_gpus=True), 2),
    "kept": seen(spec(1, idle_gpus=True), 2, **NOSET),
    "narrowed": seen(spec(1, idle_gpus=True), 2, **NOSET, CUDA_VISIBLE_DEVICES="GPU-aa,GPU-bb"),
    "halves": seen(spec(0.5, idle_gpus=True), 4, **NOSET),
    "cpu": seen(spec(0), 1, **NOSET),
    "cpu zero": seen(spec(0), 1, **NOSET, **ZERO),
    "unseen": seen(spec(1, sys.argv[1]), 1, **NOSET),
}
ray.shutdown()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What actors of a cluster with two GPUs see; one cluster for all questions."""
    folder = tmp_path_factory.mktemp("gpus")
    (folder / "ask.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(
        [sys.executable, folder / "ask.py", folder / "made"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    found["unseen"]["made"] = (folder / "made").exists()
    return found


def test_each_actor_sees_the_gpu_that_ray_assigned_and_no_other(
    answers: dict[str, dict[str, Any]],
) -> None:
    assert sorted(answers["set"]["seen"]) == ["0", "1"]


def test_actors_of_a_cluster_that_hides_no_gpu_take_the_assigned_ones_too(
    answers: dict[str, dict[str, Any]],
) -> None:
    kept = answers["kept"]
    assert sorted(kept["seen"]) == ["0", "1"]
    assert sorted(kept["indices"]) == [[0], [1]] and kept["noset"] == [True, True]
    assert [[str(place)] for (place,) in kept["indices"]] == kept["assigned"]


def test_gpus_of_a_node_that_names_them_by_uuid_are_told_apart(
    answers: dict[str, dict[str, Any]],
) -> None:
    assert sorted(answers["narrowed"]["seen"]) == ["GPU-aa", "GPU-bb"]
    assert sorted(answers["narrowed"]["indices"]) == [[0], [1]]


def test_four_halves_of_gpus_are_two_on_each(answers: dict[str, dict[str, Any]]) -> None:
    assert sorted(answers["halves"]["seen"]) == ["0", "0", "1", "1"]


@pytest.mark.parametrize("case", ["cpu", "cpu zero"])
def test_actors_without_a_gpu_see_none_whatever_the_cluster_sets(
    answers: dict[str, dict[str, Any]], case: str
) -> None:
    assert answers[case]["seen"] == [""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs of this machine are there")
def test_an_actor_whose_gpu_is_not_there_is_refused_before_its_models_are_loaded(
    answers: dict[str, dict[str, Any]],
) -> None:
    unseen = answers["unseen"]
    assert "rollout-0 on node" in unseen["refused"] and "torch sees none" in unseen["refused"]
    assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1" in unseen["refused"]
    assert not unseen["made"]
