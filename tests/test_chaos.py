"""Random faults on real runs: a slice of ``benchmarks/chaos.py``, and what its plans hold."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
BOTH = ("ray", "inline")


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chaos

    return chaos


def test_a_seed_decides_every_plan_and_each_kind_comes_once_in_every_round(chaos: Any) -> None:
    names = [*chaos.KINDS, *chaos.ALONE]
    plans = [chaos.plan_of(3, number, names, BOTH) for number in range(2 * len(names))]
    assert plans == [chaos.plan_of(3, number, names, BOTH) for number in range(2 * len(names))]
    assert plans != [chaos.plan_of(4, number, names, BOTH) for number in range(2 * len(names))]
    counted = Counter(kind for plan in plans for kind in set(plan.faults))
    assert set(counted) == set(names) and min(counted.values()) >= 2


def test_a_fault_is_planned_only_where_it_can_happen_and_at_most_one_ends_an_attempt(
    chaos: Any,
) -> None:
    names = [*chaos.KINDS, *chaos.ALONE]
    for number in range(300):
        plan = chaos.plan_of(0, number, names, BOTH)
        if plan.rivalry:
            continue
        first = [chaos.KINDS[fault.kind] for fault in plan.first]
        assert all(plan.runtime in kind.runtimes for kind in first)
        assert sum(kind.when == "end" for kind in first) <= 1
        assert len(first) == 1 or not any(kind.alone for kind in first)
        if plan.between or plan.second:
            assert any(kind.when == "end" for kind in first), str(plan)


def test_a_kind_that_is_tried_again_and_again_and_never_hits_is_named(chaos: Any) -> None:
    def result(**more: Any) -> Any:
        return chaos.Result(number=0, plan="", runtime="inline", **more)

    late = [result(missed=["SIGHUP"]), result(missed=["SIGHUP", "SIGINT"])]
    assert chaos.never_hit(late) == []
    late += [result(missed=["SIGHUP", "SIGINT"]), result(missed=["SIGINT"], hit=["SIGINT"])]
    assert chaos.never_hit(late) == ["SIGHUP"]


OLDER = """
import json, os, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
(run / "checkpoints").mkdir(parents=True)
(run / ".lease-1").touch()
own = run / "checkpoints" / ".tmp-1-step_000002"
own.write_text("begun")
with (run / "events.jsonl").open("w") as events:
    for update in range({updates}):
        line = dict(event="update_applied", update=update, time=time.time())
        events.write(json.dumps(line) + "\\n")
while not (run / ".lease-2").exists():
    time.sleep(0.01)
own.write_text("gone on with")
{last}
"""
NEWER = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
with (run / "events.jsonl").open("a") as events:
    line = dict(event="update_applied", update=5, time=time.time())
    events.write(json.dumps(line) + "\\n")
(run / ".lease-2").touch()
time.sleep(1)
"""
"""Attempts that write what a real one does, as far as the drill looks."""


def second_attempt(chaos: Any, folder: Path, *, updates: int, last: str) -> Any:
    """The drill ``second-attempt`` with an older attempt of so many updates and such an end; the
    rivalry, and both exit codes."""
    from chaos_rivals import RIVALRIES
    from chaos_runs import Attempt, Launch

    programs = iter((OLDER.format(updates=updates, last=last), NEWER))

    def start(_: Any, resume: bool) -> Any:
        launch = Launch(program=(sys.executable, "-c", next(programs)))
        name = "newer" if resume else "older"
        return Attempt(folder, folder / "run", launch, name=name, short=folder, resume=resume)

    rivalry = RIVALRIES["second-attempt"](start, folder / "run")
    return rivalry, [(attempt.end(), codes) for attempt, codes in rivalry.ends]


@linux
def test_an_event_from_just_before_an_attempt_is_not_taken_for_its_own(
    chaos: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rounded = math.ceil(time.time() * 100) / 100
    event = {"event": "update_applied", "update": 1, "time": rounded}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    launch = chaos.Launch(program=(sys.executable, "-c", "pass"))
    # As fast as a machine can be: no time passes between the event and the start.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: rounded - 0.005)
        attempt = chaos.Attempt(tmp_path, run, launch, name="newer", short=tmp_path, resume=True)
    assert attempt.end() == 0
    assert attempt.events() == []


@linux
def test_an_older_attempt_that_had_nothing_left_to_do_was_missed(
    chaos: Any, tmp_path: Path
) -> None:
    last = "(run / 'adapter').mkdir()"
    rivalry, ends = second_attempt(chaos, tmp_path, updates=chaos.UPDATES, last=last)
    assert not rivalry.hit and not rivalry.problems
    assert [code for code, _ in ends] == [0, 0] and all(code in codes for code, codes in ends)


@linux
def test_an_overtaken_attempt_may_only_go_on_with_its_own_temporary_files(
    chaos: Any, tmp_path: Path
) -> None:
    rivalry, ends = second_attempt(chaos, tmp_path, updates=2, last="sys.exit(75)")
    assert rivalry.hit and not rivalry.problems
    assert all(code in codes for code, codes in ends)


@linux
def test_an_overtaken_attempt_that_goes_on_to_its_end_is_a_fault(
    chaos: Any, tmp_path: Path
) -> None:
    rivalry, ends = second_attempt(chaos, tmp_path, updates=2, last="(run / 'run.json').touch()")
    assert rivalry.hit
    assert rivalry.problems == ["the older attempt (exit 0) changed run.json"]
    (code, codes), _ = ends
    assert code == 0 and code not in codes


@pytest.fixture(scope="module")
def slice_of_chaos(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Drills of seed 0 for two minutes, one at a time: exit code, output, and their folder."""
    work = tmp_path_factory.mktemp("chaos")
    command = [sys.executable, BENCHMARKS / "chaos.py", "--minutes", "2", "--seed", "0"]
    done = subprocess.run(
        [*map(str, command), "--jobs", "1", "--work", str(work), "--out", str(work / "chaos.md")],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
    )
    return done.returncode, done.stdout + done.stderr, work


@linux
@pytest.mark.ray
@pytest.mark.faults
def test_two_minutes_of_random_faults_leave_the_bytes_of_a_run_without_any(
    slice_of_chaos: tuple[int, str, Path],
) -> None:
    """Covers the first drills of seed 0, on Ray and in one process; the hour covers every kind."""
    code, output, work = slice_of_chaos
    assert code == 0, output
    results = [json.loads(line) for line in (work / "drills.jsonl").read_text().splitlines()]
    assert {result["runtime"] for result in results} == {"ray", "inline"}
    hit = Counter(kind for result in results for kind in result["hit"])
    assert len(hit) >= 5 and sum(hit.values()) >= 8, output
    assert all(result["resumes"] <= 1 for result in results)
    assert "0 did not" in (work / "chaos.md").read_text()


@linux
@pytest.mark.ray
@pytest.mark.faults
def test_a_drill_fails_where_the_adapter_or_the_end_of_a_run_is_another(
    chaos: Any, tmp_path: Path
) -> None:
    plan = chaos.plan_of(0, 0, ["pause-driver"], ("inline",))
    result = chaos.Drill(plan, tmp_path, "0" * 64)()
    (problem,) = result.problems
    assert problem.startswith("the final adapter is ") and problem.endswith("not 000000000000")
    assert result.hit == ["pause-driver"] and result.codes == [0]
    assert (tmp_path / "drill-0000" / "attempt-1.out").is_file()
