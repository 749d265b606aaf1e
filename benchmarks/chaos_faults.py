"""The kinds of faults: a name, what is done to a run, and the ends that are then allowed.

``during`` hits an attempt that goes on; ``end`` one that may end by it; ``between`` changes files
after an attempt that ended; ``launch`` is a surrounding that an attempt starts in.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from chaos_strikes import (
    Scene,
    babble,
    bad_line,
    damaged,
    full,
    full_for_a_while,
    garbage,
    hang_up,
    interrupt_group,
    kill_at_work,
    kill_processes,
    long_folder,
    paused,
    read_only,
    removed,
    shadowed,
    signals,
    stranger,
    torn_line,
    without_checkpoints,
)

GOES_ON = frozenset({0})
STATUS = {
    0: {"done"},
    143: {"stopped"},
    130: {"stopped"},
    129: {"stopped"},
    131: {"stopped"},
    -9: {"running", "done"},
}
"""What ``run.json`` says after an exit code, unless a kind names other words."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of fault.

    Attributes:
        strike: does it; False when there was nothing left to hit.
        codes: exit codes that the attempt may then have.
        statuses: what ``run.json`` may say then; empty means what the exit code promises.
        launch: settings, environment, output and directory of an attempt (fields of ``Launch``).
        alone: no other fault hits the same attempt.
        mount: the run directory is on a file system of this many MiB.
        hides: files whose lines no longer say everything.
    """

    name: str
    when: str
    strike: Callable[[Scene], bool] = lambda scene: True
    runtimes: tuple[str, ...] = ("ray", "inline")
    codes: frozenset[int] = GOES_ON
    statuses: frozenset[str] = frozenset()
    settings: tuple[str, ...] = ()
    launch: Callable[[Scene], Mapping[str, object]] = lambda scene: {}
    alone: bool = False
    mount: int = 0
    hides: frozenset[str] = frozenset()


ENDED = frozenset({0, 3, 4})
"""A cause outside the run: it failed, or resources did not suffice, or it was done already."""
ANY = frozenset({"running", "failed", "stopped", "done"})
SHORT = ("actors.deadline_s=20",)
RAY = ("ray",)
WORKERS = ("rollout.run", "reward.score", "learner.learn")
LEARNER_PAIR = ("actors.num_learner=2",)
STORE, PATIENT = ("train.max_failed_commits=2",), ("train.max_failed_commits=10",)


def kinds() -> dict[str, Kind]:
    """Every kind, by name."""
    known: Iterable[Kind] = (*workers(), *cluster(), *driver(), *disks(), *files(), *surroundings())
    return {kind.name: kind for kind in known}


def workers() -> list[Kind]:
    """Actors that are killed or hang in the middle of their work."""
    during = [
        Kind(
            name=f"kill-{role}",
            when="during",
            runtimes=RAY,
            strike=partial(kill_at_work, call=call),
        )
        for call in WORKERS
        for role in (call.partition(".")[0],)
    ]
    rank = Kind(
        name="kill-learner-rank",
        when="during",
        runtimes=RAY,
        settings=LEARNER_PAIR,
        strike=partial(kill_at_work, call="learner.learn"),
    )
    hang = [
        Kind(
            name=f"hang-{role}",
            when="during",
            runtimes=RAY,
            settings=SHORT,
            strike=partial(kill_at_work, call=call, number=signal.SIGSTOP),
        )
        for call in WORKERS
        for role in (call.partition(".")[0],)
    ]
    return [*during, rank, *hang]


def cluster() -> list[Kind]:
    """Ray's own processes that die or stop."""

    def ended_by(name: str, *titles: str) -> Kind:
        return Kind(
            name=name,
            when="end",
            runtimes=RAY,
            codes=frozenset({0, 3}),
            statuses=frozenset({"failed", "done"}),
            strike=lambda scene: kill_processes(scene, *titles),
        )

    return [
        ended_by("kill-raylet", "raylet/raylet"),
        ended_by("kill-gcs", "gcs_server"),
        ended_by("kill-agents", "ray::DashboardAgent", "ray::RuntimeEnvAgent"),
        ended_by("kill-head", "raylet/raylet", "gcs_server", "ray::Dashboard", "ray::RuntimeEnv"),
        Kind(
            name="pause-raylet",
            when="during",
            runtimes=RAY,
            strike=partial(paused, titles=("raylet/raylet",), seconds=2),
        ),
        Kind(
            name="pause-gcs",
            when="during",
            runtimes=RAY,
            strike=partial(paused, titles=("gcs_server",), seconds=2),
        ),
        Kind(name="babble", when="during", runtimes=RAY, strike=babble),
        Kind(name="stranger", when="during", runtimes=RAY, strike=stranger),
    ]


def driver() -> list[Kind]:
    """Signals to the driver, its output, and its lease."""
    term, hup, kill = signal.SIGTERM, signal.SIGHUP, signal.SIGKILL

    def ended_by(
        name: str, code: int, *numbers: int, statuses: frozenset[str] = frozenset()
    ) -> Kind:
        return Kind(
            name=name,
            when="end",
            codes=frozenset({0, code}),
            statuses=statuses,
            strike=lambda scene: signals(scene, *numbers),
        )

    twice = frozenset({"running", "stopped", "done"})
    return [
        ended_by("kill-driver", -9, kill),
        ended_by("SIGTERM", 143, term),
        ended_by("SIGHUP", 129, hup),
        ended_by("SIGQUIT", 131, signal.SIGQUIT),
        ended_by("two-signals", 143, term, term, statuses=twice),
        Kind(name="SIGINT", when="end", codes=frozenset({0, 130}), strike=interrupt_group),
        Kind(name="pause-driver", when="during", strike=partial(paused, titles=(), seconds=1.5)),
        Kind(
            name="closed-pipe",
            when="during",
            strike=hang_up,
            launch=lambda scene: {"output": ("pipe", "file")},
        ),
        Kind(
            name="closed-pipes",
            when="during",
            strike=hang_up,
            launch=lambda scene: {"output": ("pipe", "pipe")},
        ),
        Kind(name="full-stdout", when="launch", launch=lambda scene: {"output": ("full", "file")}),
        Kind(name="full-output", when="launch", launch=lambda scene: {"output": ("full", "full")}),
        Kind(name="no-stdout", when="launch", launch=lambda scene: {"output": ("closed", "file")}),
        Kind(
            name="no-lease",
            when="end",
            codes=frozenset({0, 75}),
            statuses=frozenset({"running", "done"}),
            strike=partial(removed, name="LEASE.json"),
        ),
        Kind(
            name="no-events",
            when="during",
            strike=partial(removed, name="events.jsonl"),
            hides=frozenset({"events"}),
        ),
    ]


def disks() -> list[Kind]:
    """A disk that is full, for a while or for good, or becomes read-only."""
    hides = frozenset({"events", "metrics"})

    def ended_by(name: str, strike: Callable[[Scene], bool]) -> Kind:
        return Kind(
            name=name,
            when="end",
            strike=strike,
            alone=True,
            mount=8,
            settings=STORE,
            codes=ENDED,
            statuses=ANY,
            hides=hides,
        )

    return [
        Kind(
            name="full-disk-for-a-while",
            when="during",
            strike=full_for_a_while,
            settings=PATIENT,
            alone=True,
            mount=8,
            hides=hides,
        ),
        ended_by("full-disk", full),
        ended_by("read-only-disk", read_only),
    ]


def files() -> list[Kind]:
    """Files of a run directory that are damaged between two attempts."""

    def between(name: str, strike: Callable[[Scene], bool], *hides: str) -> Kind:
        return Kind(name=name, when="between", strike=strike, hides=frozenset(hides))

    return [
        between("flip-checkpoint", partial(damaged, how="flip")),
        between("cut-checkpoint", partial(damaged, how="cut")),
        between("remove-from-checkpoint", partial(damaged, how="remove")),
        between("no-checkpoints", without_checkpoints),
        between("bad-byte-in-metrics", partial(bad_line, name="metrics.jsonl")),
        between("bad-byte-in-events", partial(bad_line, name="events.jsonl")),
        between("torn-metrics", partial(torn_line, name="metrics.jsonl"), "metrics"),
        between("torn-events", partial(torn_line, name="events.jsonl"), "events"),
        between("garbage-record", partial(garbage, name="run.json")),
        between("garbage-lease", partial(garbage, name="LEASE.json")),
    ]


def surroundings() -> list[Kind]:
    """Environments that a run is started in."""
    proxy = "http://127.0.0.1:9"
    return [
        Kind(name="shadowing-folders", when="launch", launch=shadowed),
        Kind(name="long-tmpdir", when="launch", launch=long_folder),
        Kind(
            name="no-home",
            when="launch",
            launch=lambda scene: {"environment": {"HOME": "/proc/nowhere"}},
        ),
        Kind(
            name="dead-proxy",
            when="launch",
            launch=lambda scene: {
                "environment": {name: proxy for name in ("http_proxy", "https_proxy", "HTTP_PROXY")}
            },
        ),
        Kind(
            name="ascii-only",
            when="launch",
            launch=lambda scene: {"environment": {"LC_ALL": "C", "PYTHONUTF8": "0"}},
        ),
    ]
