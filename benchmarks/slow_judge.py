"""Times the demo with a judge behind HTTP, slow and fast, to see whether rollouts wait for it.

Each case is ``rl-edit train`` on a Ray cluster of its own. The judge is a server on loopback that
uses OpenAI's protocol and sleeps before each response, however many requests are in flight.
Finished cases are stored under ``--work`` and never repeated::

    python benchmarks/slow_judge.py    # writes benchmarks/results/slow_judge.md; some ten minutes

The numbers are the run's own, from ``metrics.jsonl`` and ``events.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# The tests are no package: found by the path above.
from judge_server import (  # noqa: E402
    Answer,
    JudgeServer,
    completion,
    images_of,
    question_of,
    serving,
)
from rl_edit.config import RunConfig, load_config  # noqa: E402
from rl_edit.files import EVENTS, METRICS, read_json_lines  # noqa: E402
from scaling import RESULTS, report  # noqa: E402

# Of connections that come at once all but five would wait a second for their second try. Servers of
# judges take thousands.
ThreadingHTTPServer.request_queue_size = 1024

WARM, COOL = 1, 1
"""Updates that are not counted: at the start, while processes and pipeline warm up, and at the end,
when nothing is left to roll out."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the benchmark.

    Attributes:
        latency_s: seconds that the judge takes for a response.
        max_lag: updates that rollouts may lag behind.
        num_reward: reward actors, each of which scores one group at a time.
    """

    latency_s: float
    max_lag: int
    num_reward: int

    @property
    def name(self) -> str:
        return f"judge-{self.latency_s:g}s-lag-{self.max_lag}-{self.num_reward}-reward"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Means over the counted updates.

    Attributes:
        update_s: seconds from one update to the next, by the clock of the events.
        rollout_s: seconds of rollout work in an update, summed over actors.
        learn_s: seconds of learning in an update.
        scoring_s: seconds of scoring one group.
        busy: share of the rollout actors' time that they spent rolling out.
        efficiency: as the run reports it.
        in_flight: largest number of requests that the judge had at once.
        requests: in the complete run.
    """

    case: Case
    updates: int
    update_s: float
    rollout_s: float
    learn_s: float
    scoring_s: float
    busy: float
    efficiency: float
    in_flight: int
    requests: int


def wait_until_idle(seconds: float, share: float = 0.15) -> None:
    """Waits until the cores were busy for less than a share of some seconds; not at all for 0."""
    while seconds:
        before = _cpu_ticks()
        time.sleep(seconds)
        busy, total = (after - earlier for after, earlier in zip(_cpu_ticks(), before, strict=True))
        if busy < share * total:
            return


def _cpu_ticks() -> tuple[int, int]:
    """Returns the ticks in which a core was busy, and all ticks, since the machine started."""
    ticks = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    # The fourth and fifth number are idle time and waiting for disks.
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def cases(latency_s: float, num_reward: int) -> list[Case]:
    """Lists the cases, each on-policy and one update off.

    Without latency; with latency and one reward actor; with latency and several.
    """
    judges = ((0.0, 1), (latency_s, 1), (latency_s, num_reward))
    return [
        Case(latency_s=latency, max_lag=lag, num_reward=number)
        for lag in (0, 1)
        for latency, number in judges
    ]


def response(body: dict[str, Any], number: int) -> Answer:
    """Returns scores that follow from the edited image only."""
    score = [int(images_of(body)[-1].sum()) % 20 + 5, 20] if question_of(body) == "SC" else [20, 20]
    return 200, completion(json.dumps({"reasoning": "", "score": score}))


def settings(case: Case, url: str, updates: int) -> tuple[str, ...]:
    """Returns the demo's overrides: EditScore in place of its built-in judge.

    The only checkpoint is written after the last update.
    """
    return (
        f"train.updates={updates}",
        f"train.checkpoint_every={updates}",
        f"train.max_lag={case.max_lag}",
        f"actors.num_reward={case.num_reward}",
        "actors.threads=1",
        "rewards.judge=null",
        f'rewards.editscore={{kind: editscore, transport: {{base_url: "{url}", model: loopback}}}}',
    )


def stored(work: Path, case: Case, *, updates: int, idle_s: float) -> Timing:
    """Returns the case as it was timed before; times it on an idle machine otherwise."""
    file = work / f"{case.name}-{updates}-updates.json"
    if not file.is_file():
        wait_until_idle(idle_s)
        file.write_text(json.dumps(asdict(timed(case, updates=updates)), indent=2) + "\n")
    record = json.loads(file.read_text())
    return Timing(**{**record, "case": Case(**record["case"])})


def timed(case: Case, *, updates: int) -> Timing:
    """Runs a case on a judge and a cluster of its own."""
    with (
        serving(response, delay_s=case.latency_s) as judge,
        tempfile.TemporaryDirectory() as temporary,
    ):
        run, overrides = Path(temporary) / "run", settings(case, judge.url, updates)
        command = [sys.executable, "-m", "rl_edit", "train", "--preset", "tiny-rc-grpo"]
        command += ["--run-dir", str(run), *overrides]
        quiet = {"RAY_USAGE_STATS_ENABLED": "0"}
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **quiet},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise SystemExit(
                f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout[-2000:]}\n"
                f"{ended.stderr[-2000:]}"
            )
        return timing(case, load_config(preset="tiny-rc-grpo", overrides=overrides), run, judge)


def timing(case: Case, config: RunConfig, run: Path, judge: JudgeServer) -> Timing:
    """Reads the timing of a finished run from its own files."""
    lines = read_json_lines(run / METRICS)[WARM:-COOL]
    applied = [
        event["time"]
        for event in read_json_lines(run / EVENTS)
        if event["event"] == "update_applied"
    ]
    update_s = (applied[-1 - COOL] - applied[WARM - 1]) / len(lines)
    rollout_s = fmean(line["seconds/rollout"] for line in lines)
    return Timing(
        case=case,
        updates=len(lines),
        update_s=update_s,
        rollout_s=rollout_s,
        learn_s=fmean(line["seconds/learn"] for line in lines),
        scoring_s=fmean(line["seconds/reward"] for line in lines) / config.train.groups_per_update,
        busy=rollout_s / config.actors.num_rollout / update_s,
        efficiency=fmean(line["efficiency"] for line in lines),
        in_flight=judge.busiest,
        requests=len(judge.requests),
    )


HEADER = [
    "| judge, s | max_lag | reward actors | s an update | of the speed without latency "
    "| rollout actors busy | rollouts, s of work | learning, s | scoring a group, s "
    "| most requests at once | `efficiency` |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def row(timing: Timing, without: Timing) -> str:
    case = timing.case
    cells = [
        f"{case.latency_s:g}",
        str(case.max_lag),
        str(case.num_reward),
        f"{timing.update_s:.2f}",
        f"{without.update_s / timing.update_s:.0%}",
        f"{timing.busy:.0%}",
        f"{timing.rollout_s:.2f}",
        f"{timing.learn_s:.2f}",
        f"{timing.scoring_s:.2f}",
        str(timing.in_flight),
        f"{timing.efficiency:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(timings: Sequence[Timing]) -> list[str]:
    without = {timing.case.max_lag: timing for timing in timings if not timing.case.latency_s}
    return [*HEADER, *(row(timing, without[timing.case.max_lag]) for timing in timings)]


def page(timings: Sequence[Timing], config: RunConfig) -> list[str]:
    """Returns the lines of the results file."""
    questions = config.rollout.group_size * 2
    return [
        "",
        f"`rl-edit train --preset tiny-rc-grpo` ({config.train.groups_per_update} groups of "
        f"{config.rollout.group_size} an update, {config.actors.num_rollout} rollout actors and "
        f"{config.actors.num_learner} learner ranks on-policy, one thread each)",
        f"with EditScore over HTTP ({questions} requests a group) in place of the built-in judge. "
        f"Means of {timings[0].updates} updates of one run each; start-up, the first and the last "
        "update are not in them.",
        "",
        *table(timings),
        "",
        "A reward actor scores one group at a time, so groups are scored as fast as "
        "`actors.num_reward / seconds of a group`. Rollouts do not wait for it",
        "when that is at least `groups_per_update / seconds of an update`, and `max_lag: 1` lets "
        "them go on while the last groups are scored and learnt from.",
        "`efficiency` counts rollouts and learner only: a reward actor that waits for a judge "
        "elsewhere occupies no device.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--latency", type=float, default=3.0, help="seconds of the slow judge for a response")
    add("--num-reward", type=int, default=4, help="reward actors where there are several")
    add("--updates", type=int, default=6, help=f"of each run; {WARM + COOL + 1} or more")
    add(
        "--idle",
        type=float,
        default=0.0,
        help="before each run, wait until the machine was idle for so many seconds",
    )
    add(
        "--work",
        type=Path,
        default=ROOT / "runs" / "slow_judge",
        help="where cases are stored; delete it to start over",
    )
    add("--out", type=Path, default=RESULTS / "slow_judge.md")
    arguments = parser.parse_args()
    if arguments.updates <= WARM + COOL or arguments.latency <= 0 or arguments.num_reward < 2:
        parser.error(
            f"--updates {arguments.updates} --latency {arguments.latency} --num-reward "
            f"{arguments.num_reward} leave nothing to compare: give {WARM + COOL + 1}, above 0, "
            "and 2, or more"
        )
    arguments.work.mkdir(parents=True, exist_ok=True)
    timings = []
    for case in cases(arguments.latency, arguments.num_reward):
        timings.append(
            stored(arguments.work, case, updates=arguments.updates, idle_s=arguments.idle)
        )
        print(timings[-1], flush=True)
    lines = page(timings, load_config(preset="tiny-rc-grpo"))
    report(arguments.out, "A slow judge", lines)


if __name__ == "__main__":
    main()
