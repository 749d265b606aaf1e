"""Deployment: manifests and images as text, and one real submission to a cluster on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml

from rl_edit.cli.verbs import app
from rl_edit.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
SUBMIT = DEPLOY / "submit.sh"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
DIGEST = re.compile(r"^[a-z0-9./_-]+(:[A-Za-z0-9._-]+)?@sha256:[0-9a-f]{64}$")


def file_name(path: Path) -> str:
    return path.name


def pinned(package: str) -> str:
    match = re.search(
        rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert match, f"constraints.txt does not pin {package}"
    return match[1]


def rayjobs(path: Path) -> list[dict[str, Any]]:
    return [
        document
        for document in yaml.safe_load_all(path.read_text())
        if document["kind"] == "RayJob"
    ]


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs of a RayJob: submitter, head, workers."""
    cluster = job["spec"]["rayClusterSpec"]
    templates = [
        job["spec"]["submitterPodTemplate"],
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
    ]
    return [template["spec"] for template in templates]


# --- manifests ------------------------------------------------------------------------------------


def test_there_is_a_cpu_rayjob_and_an_image_for_each_kind_of_machine() -> None:
    assert [path.name for path in MANIFESTS] == ["rayjob-cpu.yaml"]
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("path", MANIFESTS, ids=file_name)
def test_manifest_ray_version_is_the_pinned_and_the_installed_one(path: Path) -> None:
    (job,) = rayjobs(path)
    assert job["apiVersion"] == "ray.io/v1"
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray") == ray.__version__


@pytest.mark.parametrize("path", MANIFESTS, ids=file_name)
def test_manifest_entrypoint_is_accepted_by_our_command_line_and_config(path: Path) -> None:
    (job,) = rayjobs(path)
    python, module_flag, module, verb, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, module_flag, module, verb) == ("python", "-m", "rl_edit", "train")
    command = typer.main.get_command(app)
    subcommand = command.get_command(None, verb)  # type: ignore[attr-defined]
    parameters = subcommand.make_context(verb, arguments).params
    overrides = [
        *([str(parameters["config"])] if parameters["config"] else []),
        *(parameters["overrides"] or []),
    ]
    config = load_config(preset=parameters["preset"], overrides=overrides)
    assert (
        config.actors.rollout_gpus == config.actors.reward_gpus == config.actors.learner_gpus == 0
    )
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = [
        mount["mountPath"]
        for container in head["containers"]
        for mount in container["volumeMounts"]
    ]
    assert any(str(parameters["run_dir"]).startswith(f"{mount}/") for mount in mounts), (
        "the driver writes outside its volumes"
    )


@pytest.mark.parametrize("path", MANIFESTS, ids=file_name)
def test_manifest_runtime_environment_is_one_ray_accepts_and_leaves_time_to_stop(
    path: Path,
) -> None:
    (job,) = rayjobs(path)
    environment = ray.runtime_env.RuntimeEnv(**yaml.safe_load(job["spec"]["runtimeEnvYAML"]))
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert (
        int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
        <= head["terminationGracePeriodSeconds"]
    )


@pytest.mark.parametrize("path", MANIFESTS, ids=file_name)
def test_manifest_pods_run_unprivileged_with_bounded_resources_and_images_by_digest(
    path: Path,
) -> None:
    (job,) = rayjobs(path)
    for pod in pods(job):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert DIGEST.match(container["image"]), container["image"]
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert (
                container["resources"]["limits"]["memory"]
                == container["resources"]["requests"]["memory"]
            )


@pytest.mark.parametrize("path", MANIFESTS, ids=file_name)
def test_manifest_keeps_the_operators_rules_that_no_schema_states(path: Path) -> None:
    (job,) = rayjobs(path)
    spec = job["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert len(job["metadata"]["name"]) <= 47
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["ttlSecondsAfterFinished"] == 0 or spec["shutdownAfterJobFinishes"] is True
    assert {"activeDeadlineSeconds", "preRunningDeadlineSeconds"} <= spec.keys()
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("path", MANIFESTS, ids=file_name)
def test_manifest_claims_every_volume_it_mounts(path: Path) -> None:
    claims = {
        document["metadata"]["name"]
        for document in yaml.safe_load_all(path.read_text())
        if document["kind"] == "PersistentVolumeClaim"
    }
    (job,) = rayjobs(path)
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(job)
        for volume in pod.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert used
    assert used <= claims


SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN"
    r"|://[^/\s:@]+:[^/\s@]+@"
    r"|(?:token|password|secret|api_key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{16,}",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "path", sorted(path for path in DEPLOY.rglob("*") if path.is_file()), ids=file_name
)
def test_deployment_file_holds_no_secret_and_no_moving_tag(path: Path) -> None:
    text = path.read_text()
    assert SECRET.search(text) is None
    assert re.search(r":latest\b", text) is None


@pytest.mark.parametrize("path", DOCKERFILES, ids=file_name)
def test_image_is_staged_pinned_and_leaves_root_behind(path: Path) -> None:
    lines = [
        line.strip()
        for line in path.read_text().replace("\\\n", " ").splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    stages = [line.split() for line in lines if line.startswith("FROM ")]
    assert len(stages) >= 2
    assert {stage[1] for stage in stages} == {"${BASE_IMAGE}"}
    assert lines.index("ARG BASE_IMAGE") < lines.index(
        next(line for line in lines if line.startswith("FROM "))
    )
    installs = [line for line in lines if re.search(r"pip install", line)]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    assert next(line for line in lines if line.startswith("ENTRYPOINT")).startswith(
        'ENTRYPOINT ["/usr/bin/tini"'
    )


# --- the script, without a cluster ----------------------------------------------------------------


def outside_ray() -> dict[str, str]:
    """The environment without any variable of Ray."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def submit(
    *arguments: str, timeout_s: float = 30, here: Path = Path("/"), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SUBMIT), *arguments],
        env={**outside_ray(), **environment},
        cwd=here,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_submit_script_is_valid_bash_and_executable() -> None:
    assert subprocess.run(["bash", "-n", str(SUBMIT)], check=False).returncode == 0
    assert os.access(SUBMIT, os.X_OK)


def test_submit_to_an_address_where_nothing_listens_leaves_with_5_within_10_seconds() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    result = submit("--", "presets", RAY_ADDRESS=address)
    assert result.returncode == 5
    assert time.monotonic() - start < 10
    assert address in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_submit_to_an_address_that_swallows_requests_leaves_with_5_within_10_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        result = submit("--", "presets", RAY_ADDRESS=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert result.returncode == 5
        assert time.monotonic() - start < 10
        assert "timed out" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "address", "says"),
    [
        ((), "http://127.0.0.1:1", "nothing to run"),
        (("--nmae", "x"), "http://127.0.0.1:1", "'--nmae'"),
        (("--", "presets"), "", "RAY_ADDRESS is not set"),
        (("--", "presets"), "ray://127.0.0.1:10001", "http://HOST:8265"),
        (("--name", "a b", "--", "presets"), "http://127.0.0.1:1", "'a b-"),
        (("--", "train", "--run-dir", "runs/x"), "http://127.0.0.1:1", "'runs/x'"),
        (("--", "train", "--preset", "tiny-rc-grpo"), "http://127.0.0.1:1", "'none'"),
    ],
    ids=[
        "no verb",
        "unknown option",
        "no address",
        "wrong scheme",
        "bad name",
        "relative run directory",
        "no run directory",
    ],
)
def test_submit_refuses_bad_usage_with_2_and_one_line(
    arguments: tuple[str, ...], address: str, says: str
) -> None:
    result = submit(*arguments, RAY_ADDRESS=address)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


# --- a real submission ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Head:
    """A cluster of one node on loopback that asks for a token."""

    address: str
    environment: dict[str, str]

    def submit(
        self,
        *arguments: str,
        timeout_s: float = 240,
        here: Path = Path("/"),
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        return submit(
            *arguments,
            timeout_s=timeout_s,
            here=here,
            **{"RAY_ADDRESS": self.address, "POLL_S": "1", **self.environment, **environment},
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Unix sockets allow about 100 characters, so the session directory cannot lie below pytest's.
    home = Path(tempfile.mkdtemp(prefix="rh-", dir="/tmp"))
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard = free_port()
    binaries = Path(sys.executable).parent
    # Ray runs its workers at nice 15: beside any other program the tests would wait for it.
    environment = {
        **outside_ray(),
        **auth,
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    where = [
        "--node-ip-address=127.0.0.1",
        f"--port={free_port()}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    ]
    # Two ports are fixed by default. Where another Ray of this machine has them, a head starts but
    # never takes a job.
    where += [
        f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
    ]
    size = [
        "--num-cpus=2",
        "--object-store-memory=268435456",
        "--include-dashboard=true",
        "--disable-usage-stats",
    ]
    log = home / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                str(binaries / "ray"),
                "start",
                "--head",
                "--block",
                f"--temp-dir={home / 'r'}",
                *where,
                *size,
            ],
            env=environment,
            cwd=home,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_listening(dashboard, process, log)
        yield Head(address=f"http://127.0.0.1:{dashboard}", environment=auth)
    finally:
        _end(process)
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_listening(
    port: int, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 180
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the head ended:\n{log.read_text()}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.25)
    raise AssertionError(f"no dashboard within {timeout_s:g} s:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends this head and what it started, by process id.

    ``ray stop`` would end every Ray on the machine.
    """
    family = _descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    for pid in [process.pid, *family]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=15)


def _descendants(pid: int) -> list[int]:
    import psutil

    return (
        [child.pid for child in psutil.Process(pid).children(recursive=True)]
        if psutil.pid_exists(pid)
        else []
    )


CANARY = f"canary{secrets.token_hex(8)}"
SMALL = (
    "actors.num_rollout=1",
    "actors.num_learner=1",
    "rollout.group_size=4",
    "rollout.num_steps=3",
    "algorithm.objective={kind: neighbor, num_anchors: 2}",
)


@pytest.fixture(scope="module")
def submitted(head: Head) -> subprocess.CompletedProcess[str]:
    """The job verb-1, from an environment with secrets."""
    verb = ("--name", "verb", "--attempt", "1", "--", "presets")
    return head.submit(*verb, HF_TOKEN=CANARY, WANDB_API_KEY=CANARY)


@pytest.mark.ray
def test_a_submitted_verb_runs_on_the_cluster_and_its_output_comes_back(
    submitted: subprocess.CompletedProcess[str],
) -> None:
    assert submitted.returncode == 0, submitted.stderr
    assert "tiny-rc-grpo" in submitted.stdout
    assert "verb-1 is SUCCEEDED" in submitted.stderr


@pytest.mark.ray
def test_a_failing_job_leaves_with_3_and_a_used_submission_id_with_5(head: Head) -> None:
    failed = head.submit(
        "--name", "bad", "--attempt", "1", "--", "show-config", "--preset", "no-such-preset"
    )
    assert failed.returncode == 3, failed.stderr
    assert "no-such-preset" in failed.stdout
    again = head.submit("--name", "bad", "--attempt", "1", "--", "presets")
    assert again.returncode == 5
    assert "bad-1" in again.stderr


@pytest.mark.ray
def test_a_cluster_with_a_token_refuses_a_submission_without_it(head: Head) -> None:
    anonymous = submit("--", "presets", RAY_ADDRESS=head.address)
    assert anonymous.returncode == 5
    assert "RAY_AUTH_TOKEN_PATH" in anonymous.stderr


@pytest.mark.ray
def test_the_environment_of_the_submitter_stays_at_home(
    head: Head, submitted: subprocess.CompletedProcess[str]
) -> None:
    assert submitted.returncode == 0, submitted.stderr
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    shown = subprocess.run(
        [
            "curl",
            "-s",
            "--noproxy",
            "*",
            "-H",
            f"Authorization: Bearer {token}",
            f"{head.address}/api/jobs/verb-1",
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout
    assert json.loads(shown)["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert CANARY not in shown + submitted.stdout + submitted.stderr


@pytest.mark.ray
def test_a_submitted_training_with_a_reward_of_the_users_leaves_metrics_and_an_adapter(
    head: Head, tmp_path: Path
) -> None:
    """Its directory holds links, and a folder that is called like a package of ours."""
    run_dir, project = tmp_path / "run", tmp_path / "project"
    (project / "learner").mkdir(parents=True)
    (project / "learner" / "__init__.py").write_text("raise RuntimeError('another learner')\n")
    (project / "up").symlink_to("..")
    settings = yaml.safe_load((ROOT / "rl_edit/presets/tiny-rc-grpo.yaml").read_text())
    mine = {"kind": "python", "function": "my_rewards:score", "low": 0, "high": 1, "weight": 0.1}
    settings["rewards"]["mine"] = mine
    (project / "mine.yaml").write_text(yaml.safe_dump(settings))
    (project / "my_rewards.py").write_text(
        "def score(candidates):\n    return [0.5 for _ in candidates.images]\n"
    )
    arguments = [
        "mine.yaml",
        "--run-dir",
        str(run_dir),
        "train.updates=2",
        "train.groups_per_update=2",
        *SMALL,
    ]
    result = head.submit(
        *("--name", "train", "--attempt", "1", "--", "train", *arguments),
        timeout_s=600,
        here=project,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 1]
    assert sorted(
        path.suffix for path in (run_dir / "adapter").iterdir() if path.suffix == ".safetensors"
    ) == [".safetensors"]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "done"


@pytest.mark.ray
@pytest.mark.faults
def test_a_stopped_job_saves_what_it_did_and_is_not_a_success(head: Head, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = ["train.updates=1000", "train.groups_per_update=1", "train.checkpoint_every=1000"]
    arguments = ["--preset", "tiny-rc-grpo", "--run-dir", str(run_dir), *endless, *SMALL]
    waiting = subprocess.Popen(
        [str(SUBMIT), "--name", "stopped", "--attempt", "1", "--", "train", *arguments],
        env={**outside_ray(), **head.environment, "RAY_ADDRESS": head.address, "POLL_S": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while (
            not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "metrics.jsonl").read_text()
        ):
            assert waiting.poll() is None and time.monotonic() < deadline, (
                "the job never did an update"
            )
            time.sleep(0.2)
        stop = [
            str(Path(sys.executable).parent / "ray"),
            "job",
            "stop",
            "--address",
            head.address,
            "stopped-1",
        ]
        stopped = subprocess.run(
            stop,
            env={**outside_ray(), **head.environment},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert stopped.returncode == 0, stopped.stderr
        _, shown = waiting.communicate(timeout=180)
    finally:
        waiting.kill()
    assert waiting.returncode == 130, shown
    assert "stopped-1 is STOPPED" in shown
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "stopped"
    done = len((run_dir / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    assert record["adapter"].startswith(f"{done}:")
