"""Which process has which GPU, and whether its models fit: on records, without a GPU.

Those that are marked ``gpu`` do it on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import gpu_checks
from actors.devices import CONTEXT_BYTES, Device, Gpu, positions
from actors.roles import WorkerSpec, worker_roles
from commands import Command
from learner.learner import Learner
from rl_edit.config import RunConfig
from rl_edit.editors import editor_bytes, load_editor
from rl_edit.errors import ResourcesInfeasible
from runs import small_config

GIB = 2**30
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("assigned", "visible", "expected"),
    [
        (["0"], None, (0,)),
        (["3"], None, (3,)),
        (["3", "1"], None, (1, 3)),
        (["10", "9"], None, (9, 10)),
        (["3"], "3", (0,)),  # Ray has set the variable
        (["3"], "2,3", (1,)),  # Ray was told not to
        (["3"], " 2, 3 ", (1,)),
        (["3", "2"], "3,2", (0, 1)),
        (["1"], "11,1", (1,)),
        (["GPU-bb"], "GPU-aa,GPU-bb", (1,)),
        (["GPU-bb17-c4"], "GPU-aa,GPU-bb17", (1,)),
        (["MIG-b"], "MIG-a,MIG-b", (1,)),
        (["1"], "0,-1,1", ()),  # CUDA reads no further
        (["0"], "-1", ()),
        (["0"], "", ()),
        (["5"], "0,1", ()),
        (["GPU-aa"], None, ()),
        ([], "0,1", ()),
        ([], None, ()),
    ],
)
def test_an_assigned_gpu_has_the_index_of_its_place_among_the_visible_ones(
    assigned: list[str], visible: str | None, expected: tuple[int, ...]
) -> None:
    assert positions(assigned, visible) == expected


def device(worker: str, *uuids: str, share: float = 1, gib: float = 80, **more: Any) -> Device:
    """A process that sees GPUs of these UUIDs."""
    content: dict[str, Any] = {
        "node": "n1 (10.0.0.1)",
        "node_id": "a",
        "assigned": ("0",),
        "variable": "CUDA_VISIBLE_DEVICES",
        "visible": "0",
        "positions": (0,),
        "noset": False,
        **more,
    }
    gpus = tuple(Gpu(uuid=uuid, name="A100", nbytes=int(gib * GIB)) for uuid in uuids)
    return Device(worker=worker, share=share, gpus=gpus, **content)


def require(one: Device, *others: Device, weights: dict[str, int] | None = None) -> None:
    kind = one.worker.rpartition("-")[0]
    spec = WorkerSpec(process=kind, make=object, weights=weights or {})
    gpu_checks.require(one, others, {kind: spec})


def test_two_processes_on_one_gpu_are_refused_with_both_names_the_gpu_and_the_variable() -> None:
    hidden = device("rollout-1", "GPU-a", noset=True, visible=None, assigned=("1",))
    with pytest.raises(ResourcesInfeasible) as refused:
        require(hidden, device("learner-0", "GPU-b"), device("rollout-0", "GPU-a"))
    message = str(refused.value)
    for words in ("rollout-0 (1, Ray's id 0)", "rollout-1 (1, Ray's id 1)", "GPU-a", "n1 (10.0.0"):
        assert words in message
    assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set there" in message
    assert "learner-0" not in message and refused.value.exit_code == 4


def test_the_cause_of_a_shared_gpu_is_a_jobs_variable_or_a_second_ray_node() -> None:
    with pytest.raises(ResourcesInfeasible, match=r"CUDA_VISIBLE_DEVICES is 0 .*runtime_env"):
        require(device("rollout-1", "GPU-a"), device("rollout-0", "GPU-a"))
    with pytest.raises(ResourcesInfeasible, match="Two Ray nodes offer this GPU"):
        require(device("rollout-1", "GPU-a", node_id="b"), device("rollout-0", "GPU-a"))


def test_fractions_that_make_one_gpu_share_it_and_those_that_make_more_do_not() -> None:
    thirds = [device(f"rollout-{slot}", "GPU-a", share=1 / 3) for slot in range(3)]
    require(*thirds)
    require(device("reward-0", "GPU-a", share=0.4), device("rollout-0", "GPU-a", share=0.6))
    with pytest.raises(ResourcesInfeasible, match=r"hold 1\.2 of it together"):
        require(device("reward-0", "GPU-a", share=0.6), device("rollout-0", "GPU-a", share=0.6))


def test_a_process_with_two_gpus_shares_neither() -> None:
    pair = device("reward-0", "GPU-a", "GPU-b", share=2, assigned=("0", "1"))
    require(pair, device("reward-1", "GPU-c", "GPU-d", share=2))
    with pytest.raises(ResourcesInfeasible, match="GPU-b"):
        require(pair, device("rollout-0", "GPU-b"))


def test_a_process_that_sees_fewer_gpus_than_it_reserved_is_refused() -> None:
    with pytest.raises(ResourcesInfeasible, match=r"torch sees none there .*is -1"):
        require(device("rollout-0", visible="-1"))
    with pytest.raises(ResourcesInfeasible, match=r"reserved 2 GPUs.*torch sees 1 there"):
        require(device("reward-0", "GPU-a", share=2))
    idle = WorkerSpec(process="rollout", make=object, idle_gpus=True)
    gpu_checks.require(device("rollout-0"), (), {"rollout": idle})


def test_weights_that_exceed_a_share_of_a_gpu_are_refused_with_the_sum() -> None:
    quarter = device("rollout-0", "GPU-a", share=0.25, gib=80)
    weights = {"weights of E in bfloat16": 15 * GIB, "judge": 4 * GIB}
    require(quarter, weights=weights)
    with pytest.raises(ResourcesInfeasible) as refused:
        require(quarter, weights={**weights, "judge": 5 * GIB})
    message = str(refused.value)
    assert "0.25 of GPU-a (A100, 80.0 GiB" in message and "which is 20.0 GiB" in message
    assert "at least 20.5: 15.0 weights of E in bfloat16 + 5.0 judge + 0.5 for CUDA" in message
    assert "Raise actors.rollout_gpus above 0.26" in message
    assert "activations come on top" in message


def test_a_whole_gpu_and_models_of_unknown_size_are_not_counted() -> None:
    whole, part = device("rollout-0", "GPU-a", gib=1), device("rollout-0", "GPU-a", share=0.01)
    require(whole, weights={"weights": 90 * GIB})
    require(part)
    with pytest.raises(ResourcesInfeasible):
        require(part, weights={"weights": GIB})


def test_the_counted_bytes_are_those_of_the_loaded_editor(small_editor: str) -> None:
    editor = small_config(small_editor).editor
    pipeline = load_editor(editor).pipeline  # type: ignore[attr-defined]
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    loaded = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    assert editor_bytes(editor) == pytest.approx(loaded, rel=0.02)
    half = editor.model_copy(update={"dtype": "bfloat16"})
    assert editor_bytes(half) * 2 == editor_bytes(editor)


def shared(editor: str, *overrides: str) -> RunConfig:
    return small_config(editor, "actors.runtime=ray", *overrides)


def test_weights_are_counted_for_processes_that_share_a_gpu(small_editor: str) -> None:
    config = shared(small_editor, "actors.rollout_gpus=0.5", "actors.learner_gpus=0.5")
    roles = worker_roles(config, frozenset(), Learner)
    assert list(roles["rollout"].weights.values()) == [editor_bytes(config.editor)]
    assert roles["rollout"].weights == roles["learner"].weights and not roles["reward"].weights
    whole = worker_roles(shared(small_editor, "actors.rollout_gpus=1"), frozenset(), Learner)
    assert not whole["rollout"].weights


def test_who_has_which_gpu_is_an_event_a_line_and_part_of_the_record() -> None:
    events: list[dict[str, Any]] = []
    lines: list[str] = []
    hardware: dict[str, Any] = {"cpus": 2}
    report = gpu_checks.Report(
        event=lambda name, **fields: events.append({"event": name, **fields}),
        say=lines.append,
        hardware=hardware,
    )
    report(device("rollout-0", "GPU-a", share=0.5, assigned=("1",)))
    assert lines == ["rollout-0: GPU 1 of node n1 (10.0.0.1), A100, 80.0 GiB, GPU-a, 0.5 of it"]
    assert hardware == {"cpus": 2, "actors": lines}
    assert events == [
        {
            "event": "device",
            "worker": "rollout-0",
            "node": "n1 (10.0.0.1)",
            "share": 0.5,
            "assigned": ["1"],
            "gpus": [{"uuid": "GPU-a", "name": "A100", "memory_gib": 80.0}],
        }
    ]


JUDGE = '{"kind": "editscore", "transport": {"kind": "transformers", "path": "X", "device": "%s"}}'

REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an index": (
        ("editor.device=cuda:1", "actors.rollout_gpus=1"),
        ("editor.device is 'cuda:1'", "Ray chooses", "editor.device=auto"),
    ),
    "no gpu": (("editor.device=cuda",), ("actors.rollout_gpus is 0",)),
    "a judge's index": (
        (f"rewards.judge={JUDGE % 'cuda:2'}", "actors.reward_gpus=1"),
        ("rewards.judge.transport.device is 'cuda:2'",),
    ),
    "a judge's device": (
        (f"rewards.judge={JUDGE % 'gpu'}",),
        ("rewards.judge.transport.device 'gpu' is no device",),
    ),
    "a share of vLLM": (
        (
            'rewards.judge={"kind": "editscore", "transport": {"kind": "vllm", "path": "X"}}',
            "actors.reward_gpus=0.5",
        ),
        ("rewards.judge.transport.gpu_memory_utilization is 0.9", "reserves 0.5"),
    ),
    "a judge on two": (
        (
            'rewards.judge={"kind": "editscore", "transport": {"kind": "vllm", "path": "X", '
            '"tensor_parallel_size": 2}}',
            "actors.reward_gpus=1",
        ),
        ("tensor_parallel_size is 2 GPUs", "set actors.reward_gpus=2"),
    ),
    "one and a half": (("actors.reward_gpus=1.5",), ("reward_gpus 1.5", "whole number")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_device_that_no_actor_will_have_is_refused_by_the_dry_run(
    rl_edit: Command, small_editor: str, tmp_path: Path, name: str
) -> None:
    overrides, words = REFUSED[name]
    small_config(small_editor, directory=tmp_path)
    code, _, lines = rl_edit(
        "train", tmp_path / "run.yaml", "--dry-run", "actors.runtime=ray", *overrides
    )
    assert code == 2 and all(word in " ".join(lines) for word in words), lines


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("NVIDIA_VISIBLE_DEVICES", "void"),
    ],
)
def test_a_variable_that_hides_all_gpus_of_a_run_that_needs_some_is_named(
    rl_edit: Command,
    small_editor: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
) -> None:
    small_config(small_editor, directory=tmp_path)
    monkeypatch.setenv(variable, value)
    arguments = ("train", tmp_path / "run.yaml", "--dry-run", "actors.runtime=ray")
    code, _, lines = rl_edit(*arguments, "actors.rollout_gpus=1")
    assert code == 4 and f"{variable}={value!r} hides all GPUs" in " ".join(lines)
    # The machines of a cluster have environments of their own.
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert rl_edit(*arguments, "actors.rollout_gpus=1")[0] == 0
    monkeypatch.delenv("RAY_ADDRESS")
    assert rl_edit(*arguments)[0] == 0


def test_gpus_that_a_run_reserves_in_vain_are_said(
    rl_edit: Command, small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_config(small_editor, directory=tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, out, _ = rl_edit(
        "train",
        tmp_path / "run.yaml",
        "--dry-run",
        *("actors.runtime=ray", "actors.rollout_gpus=2"),
    )
    assert code == 0 and "others of each actor stand idle" in " ".join(out.split())
    assert "editor.device is cpu" in out


SHARING = """
import asyncio, json, sys
import ray, torch
from actors.ray_executor import RayExecutor
from actors.roles import WorkerSpec

class Takes:
    def ready(self):
        return torch.cuda.get_device_properties(0).total_memory
    def take(self, share):
        total = torch.cuda.get_device_properties(0).total_memory
        try:
            torch.empty(int(share * total), dtype=torch.uint8, device="cuda")
            return torch.cuda.current_device()
        except torch.OutOfMemoryError:
            return "no room"

async def main():
    devices = []
    spec = WorkerSpec(process="rollout", make=Takes, gpus=0.5)
    executor = RayExecutor({"rollout": spec}, report=devices.append)
    workers = [executor.spawn("rollout", slot) for slot in range(2)]
    for worker in workers:
        await worker.call("ready")
    found = [await worker.call("take", share) for worker in workers for share in (0.4, 0.6)]
    await executor.close()
    print(json.dumps([found, [gpu.uuid for device in devices for gpu in device.gpus]]))

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
asyncio.run(main())
"""


@pytest.mark.gpu
@pytest.mark.ray
def test_two_actors_share_a_gpu_and_neither_takes_more_than_its_half(tmp_path: Path) -> None:
    (tmp_path / "share.py").write_text(SHARING)
    done = subprocess.run(
        [sys.executable, tmp_path / "share.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    import json

    found, uuids = json.loads(done.stdout.splitlines()[-1])
    assert found == [0, "no room", 0, "no room"]
    assert len(uuids) == 2 and len(set(uuids)) == 1 and uuids[0].startswith("GPU-")


@pytest.mark.gpu
def test_the_allowance_for_cuda_itself_covers_what_a_process_takes() -> None:
    before, _ = torch.cuda.mem_get_info()
    program = (
        "import torch; torch.ones(8, device='cuda') @ torch.ones(8, device='cuda'); "
        "print(torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    free, reserved = map(int, run.stdout.split())
    assert before - free - reserved <= CONTEXT_BYTES
