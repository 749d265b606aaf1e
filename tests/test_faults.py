"""The fault matrix on the real controller, with fake workers and without Ray: every promise of
docs/reliability.md in milliseconds.

A run's story is its adapter, what each update was made of, and the chain of consumed groups. A
fault was survived when the
story is the one of the undisturbed run: nothing lost, nothing trained on twice, no update applied
    twice.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import pickle
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import Crash, FakeLearner, FakeRollout, Fault, chaos, fake_roles, faulty
from learner.controller import checkpoint
from learner.controller.lease import Lease
from learner.controller.run import Outcome
from rl_edit import wire
from rl_edit.errors import Fenced, ResourcesInfeasible
from rl_edit.files import JsonLines, read_json_lines
from rl_edit.messages import LearnOrder
from rl_edit.method.advantages import Declined, GroupCredit, SplitCredit
from rl_edit.method.update import TrainingFailed
from rl_edit.provenance import differences
from rl_edit.rewards import score_candidates
from rl_edit.types import AdapterId
from runs import (
    SilentObserver,
    StopAfter,
    adapter_bytes,
    command,
    events_of,
    metrics_of,
    read_json,
    run_inline,
    small_config,
)
from test_checkpoint import flip
from test_rewards import ANSWERS, python_reward, small_group

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parent.parent
EDITOR = "builtin:tiny-kontext"
PATIENT = (
    "actors.infra_retries=1000",
    "actors.data_retries=1000",
    "actors.quarantine_after=1000",
    "actors.deadline_s=0.1",
)
Story = tuple[dict[str, bytes], list[tuple[int, str, tuple[str, ...]]], str]


def fakes(directory: Path, *overrides: str, faults: tuple[Fault, ...] = (), **more: Any) -> Outcome:
    """A run of fake workers; ``more`` is a class for a role, or an argument of ``run_inline``."""
    classes = {role: more.pop(role) for role in ("rollout", "reward", "learner") if role in more}
    config = small_config(EDITOR, "editor.resolution=64", *overrides)
    return run_inline(
        config, directory, change=fake_roles(**classes), **{"executor": faulty(*faults), **more}
    )


def story(outcome: Outcome, directory: Path) -> Story:
    applied = [
        (e["update"], e["adapter"], tuple(e["consumed"]))
        for e in events_of(directory, "update_applied")
    ]
    return adapter_bytes(outcome), applied, events_of(directory, "checkpoint")[-1]["chain"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Story]:
    """The story of a run without faults, by its overrides."""
    known: dict[tuple[str, ...], Story] = {}

    def log(*overrides: str) -> Story:
        if overrides not in known:
            directory = tmp_path_factory.mktemp("undisturbed")
            known[overrides] = story(fakes(directory, *overrides), directory)
        return known[overrides]

    return log


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the lease's own."""
    files = (
        path
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith((".lease", "LEASE", ".LEASE"))
    )
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


class Notes(SilentObserver):
    """Keeps what a person would have been told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_faults_would_show(tmp_path: Path, undisturbed: Callable[..., Story]) -> None:
    """A story differs as soon as one group, or the order of two, does."""
    assert story(fakes(tmp_path / "same"), tmp_path / "same") == undisturbed()
    for override in ("seed=1", "data.num_train=7", "train.max_lag=1"):
        assert undisturbed(override)[0] != undisturbed()[0]


# --- 2, 3: results that never arrive, workers that hang -------------------------------------------


def test_a_result_that_never_arrives_is_made_again_and_the_stall_names_it_with_its_age(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    notes = Notes()
    overrides = ("actors.deadline_s=0.3", "actors.stall_s=0.08")
    outcome = fakes(
        tmp_path, *overrides, faults=(Fault("rollout", "run", 2, "hang"),), observer=notes
    )
    assert story(outcome, tmp_path) == undisturbed()
    lost = events_of(tmp_path, "actor_lost")[0]
    assert "no answer within 0.3 s" in lost["reason"]
    stall = events_of(tmp_path, "stall")[0]
    assert stall["oldest"][0]["what"] == lost["during"]
    assert re.fullmatch(r"rollout of [0-9a-f]{16}\.0-4", lost["during"])
    assert (
        stall["oldest"][0]["worker"] == lost["worker"]
        and stall["oldest"][0]["age_s"] > 0
        and stall["pending"] >= 1
    )
    assert any(lost["during"] in note and lost["worker"] in note for note in notes.notes)


def test_a_slot_that_hangs_again_and_again_is_closed_and_the_run_goes_on_with_one_less(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    hangs = Fault("rollout", "run", 1, "hang", times=1000, worker_slot=0)
    outcome = fakes(
        tmp_path,
        "actors.deadline_s=0.1",
        "actors.num_rollout=2",
        "actors.quarantine_after=3",
        faults=(hangs,),
    )
    assert story(outcome, tmp_path) == undisturbed()
    (closed,) = events_of(tmp_path, "seat_quarantined")
    assert (closed["worker"], closed["kills"], closed["left"]) == ("rollout-0.3", 3, 1)
    assert [e["worker"] for e in events_of(tmp_path, "actor_lost")] == [
        "rollout-0.1",
        "rollout-0.2",
        "rollout-0.3",
    ]


def test_fewer_rollout_actors_than_the_minimum_end_the_run_and_say_why_and_what_was_done_is_kept(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    hangs = Fault("rollout", "run", 3, "hang", times=1000)
    with pytest.raises(
        TrainingFailed,
        match=r"lost 2 times .*no answer within 0\.1 s.* fewer than actors\.min_rollout 1.*"
        "--resume",
    ):
        fakes(tmp_path, "actors.deadline_s=0.1", "actors.quarantine_after=2", faults=(hangs,))
    assert story(fakes(tmp_path, resume=True), tmp_path) == undisturbed()


@pytest.mark.parametrize("role", ["rollout", "reward"])
def test_too_few_actors_end_the_run_although_an_earlier_update_still_waits_for_one(
    tmp_path: Path, role: str
) -> None:
    """The last seat is lost on work for update 1 while update 0 waits for it: waiting would never
    end."""
    overrides = (
        "train.max_lag=1",
        "train.groups_per_update=1",
        "actors.quarantine_after=1",
        "actors.deadline_s=0.1",
    )
    faults = {
        "rollout": (Fault("reward", "score", 1, "lose_blob"), Fault("rollout", "run", 2, "hang")),
        "reward": (
            Fault("reward", "score", 1, "raise"),
            Fault("reward", "score", 2, "hang", times=2),
        ),
    }
    with pytest.raises(TrainingFailed, match=f"fewer than actors.min_{role} 1"):
        fakes(tmp_path, *overrides, faults=faults[role])


# --- 4, 5: judges ---------------------------------------------------------------------------------


def test_a_judge_that_hangs_is_asked_again_elsewhere(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    overrides = ("actors.deadline_s=0.1", "actors.num_reward=2")
    outcome = fakes(tmp_path, *overrides, faults=(Fault("reward", "score", 2, "hang"),))
    assert story(outcome, tmp_path) == undisturbed()
    assert metrics_of(tmp_path)[0]["retries/infra"] == 1
    assert [e["role"] for e in events_of(tmp_path, "actor_replaced")] == ["reward"]


SLOW = ("actors.deadline_s=0.1", "actors.infra_retries=1", "actors.quarantine_after=10")


def test_a_group_that_no_judge_answers_for_is_dropped_within_the_budget_and_never_scored_zero(
    tmp_path: Path,
) -> None:
    outcome = fakes(
        tmp_path,
        *SLOW,
        "train.max_dropped_groups=1",
        faults=(Fault("reward", "score", 1, "hang", times=2, worker_slot=0),),
    )
    lines = metrics_of(tmp_path)
    assert outcome.updates_done == 3
    assert [(line["groups/used"], line["groups/dropped"]) for line in lines] == [
        (1, 1),
        (2, 0),
        (2, 0),
    ]
    ((reason, count),) = lines[0]["groups/dropped_reasons"]["lost"].items()
    assert (
        count == 1
        and "lost its worker 2 times (actors.infra_retries 1): no answer within 0.1 s" in reason
    )
    assert (
        events_of(tmp_path, "group_lost")[0]["group_id"]
        in events_of(tmp_path, "update_applied")[0]["consumed"]
    )
    rewards = [line["reward/preservation/mean"] for line in lines]
    assert all(reward > 0.2 for reward in rewards), "a lost group has no share in the mean"


def test_more_groups_without_an_answer_than_the_budget_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingFailed,
        match=r"1 of 2 groups of update 0 are lost .*max_dropped_groups is 0: scoring of .* lost "
        "its worker",
    ):
        fakes(tmp_path, *SLOW, faults=(Fault("reward", "score", 1, "hang", times=2),))
    assert metrics_of(tmp_path) == []


CREDITS = [
    *(
        GroupCredit(normalise=n, deviation=d)
        for n, d in itertools.product(("minibatch", "group", "none"), ("group", "batch"))
    ),
    GroupCredit(quasi_norm=0.8),
    SplitCredit(background_terms=("two",)),
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(), st.floats(0, 1), st.none(), st.sampled_from(["0.5", [], 10**400, True])
        ),
        max_size=6,
    )
)
def test_whatever_a_judge_answers_no_advantage_is_anything_but_finite(responses: list[Any]) -> None:
    terms = [python_reward(name="one"), python_reward(name="two")]
    tables = []
    for stated in (responses, [0.1, 0.4, 0.2, 0.9]):
        ANSWERS[:] = stated
        tables.append(score_candidates(terms, small_group(4), group_id="w"))
    areas = torch.tensor([[[True, True, False, False]]])
    for credit in CREDITS:
        first, second = credit(tables, [areas, areas])
        assert isinstance(first, Declined) or bool(first.values.isfinite().all())
        assert isinstance(first, Declined) or bool(tables[0].valid.all())
        assert not isinstance(second, Declined) and bool(second.values.isfinite().all())


class Payload:
    """Unpickling this would set a mark."""

    mark: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def of_another_group(table: Any) -> Any:
    return replace(table, group_id="f" * 16)


def not_a_number_but_valid(table: Any) -> Any:
    return replace(table, values=table.values.clone().index_fill_(0, torch.tensor([1]), math.nan))


def one_row_short(table: Any) -> Any:
    return replace(table, values=table.values[1:], valid=table.valid[1:])


@pytest.mark.parametrize(
    "change",
    [of_another_group, not_a_number_but_valid, one_row_short],
    ids=lambda change: change.__name__,
)
def test_a_table_that_cannot_be_right_is_asked_for_again_and_never_learnt_from(
    tmp_path: Path, undisturbed: Callable[..., Story], change: Callable[[Any], Any]
) -> None:
    wrong = Fault(
        "reward",
        "score",
        2,
        "corrupt",
        change=lambda packed: wire.pack(change(wire.unpack(packed))),
    )
    assert story(fakes(tmp_path, faults=(wrong,)), tmp_path) == undisturbed()
    assert len(events_of(tmp_path, "work_failed")) == 1


@pytest.mark.parametrize("reply", ["pickle", "noise", "another record"])
def test_a_reward_reply_that_is_no_table_is_a_failed_item_and_a_pickle_in_it_does_not_run(
    tmp_path: Path, reply: str
) -> None:
    Payload.mark = tmp_path / "executed"
    replies = {
        "pickle": np.frombuffer(pickle.dumps(Payload()), dtype=np.uint8),
        "noise": np.frombuffer(random.Random(0).randbytes(64), dtype=np.uint8),
        "another record": wire.pack(AdapterId(0, "0" * 64)),
    }
    wrong = Fault("reward", "score", 1, "corrupt", change=lambda packed: replies[reply], times=3)
    with pytest.raises(
        TrainingFailed,
        match=r"failed 3 times \(actors\.data_retries 2\): the reply is no reward table",
    ):
        fakes(tmp_path / "run", "train.groups_per_update=1", faults=(wrong,))
    assert not Payload.mark.exists()


# --- 6: losses that are not finite ----------------------------------------------------------------


class Skipping(FakeLearner):
    """Its loss is not finite in update 1."""

    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> Any:
        before = self.weight.clone()
        report, *blobs_of = super().learn(order, *blobs)
        if order.update != 1:
            return report, *blobs_of
        self.weight = before
        named, *blobs_of = self.export()
        return replace(
            report,
            adapter=named.adapter,
            result=named.result,
            skipped="the loss is nan",
            skipped_in_a_row=1,
            metrics={"loss": math.nan},
        ), *blobs_of


def test_a_skipped_step_is_reported_with_its_evidence_and_the_run_goes_on(tmp_path: Path) -> None:
    outcome = fakes(tmp_path, learner=Skipping)
    assert outcome.updates_done == 3
    assert [line["step/skipped"] for line in metrics_of(tmp_path)] == [0, 1, 0]
    (event,) = events_of(tmp_path, "step_skipped")
    assert (event["update"], event["reason"], event["in_a_row"]) == (1, "the loss is nan", 1)
    applied = [e["adapter"].split(":")[1] for e in events_of(tmp_path, "update_applied")]
    assert applied[0] == applied[1] != applied[2]
    folder = tmp_path / "diagnostics" / "update_000001"
    facts = read_json(folder / "facts.json")
    assert facts["reason"] == "the loss is nan"
    assert {f"{work_id}.safetensors" for work_id in facts["groups"]} == {
        path.name for path in folder.glob("*.safetensors")
    }
    assert len(facts["groups"]) == 2
    for retained in facts["groups"].values():
        assert np.isfinite(retained["values"]).all()


class Refusing(FakeLearner):
    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> Any:
        if order.update == 2:
            raise TrainingFailed("the loss was not finite three times in a row")
        return super().learn(order, *blobs)


def test_a_learner_that_stops_the_run_leaves_every_update_before_in_a_checkpoint(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    with pytest.raises(TrainingFailed, match="three times in a row"):
        fakes(tmp_path, "train.checkpoint_every=10", learner=Refusing)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
    assert story(fakes(tmp_path, resume=True), tmp_path) == undisturbed()


# --- 7: the learner dies --------------------------------------------------------------------------

DEATHS = {
    "before the step": (Fault("learner", "learn", 2, "lose"),),
    "after the step": (Fault("learner", "learn", 2, "die_after"),),
    "twice after the step": (Fault("learner", "learn", 2, "die_after", times=2),),
    "hanging": (Fault("learner", "learn", 2, "hang"),),
    "while it is rebuilt": (
        Fault("learner", "learn", 2, "die_after"),
        Fault("learner", "ready", 2, "lose"),
    ),
    "while it is restored": (
        Fault("learner", "learn", 2, "lose"),
        Fault("learner", "restore", 1, "die_after"),
    ),
    "answering late": (Fault("learner", "learn", 2, "late"),),
}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("when", DEATHS)
def test_a_learner_that_dies_is_rebuilt_and_no_update_is_applied_twice_or_seen_early(
    tmp_path: Path, undisturbed: Callable[..., Story], when: str, lag: int
) -> None:
    durable: list[tuple[int, bool]] = []

    class Witness(FakeRollout):
        """Looks, whenever weights are published, whether a checkpoint of them exists."""

        def load(self, blob: np.ndarray) -> AdapterId:
            step = wire.unpack(blob).id.step
            durable.append(
                (
                    step,
                    step == 0
                    or (tmp_path / "checkpoints" / f"step_{step:06d}" / "MANIFEST.json").is_file(),
                )
            )
            return super().load(blob)

    overrides = (f"train.max_lag={lag}",)
    outcome = fakes(
        tmp_path, *overrides, "actors.deadline_s=0.2", faults=DEATHS[when], rollout=Witness
    )
    assert story(outcome, tmp_path) == undisturbed(*overrides)
    assert [e["during"] for e in events_of(tmp_path, "learner_lost")] == ["update 1"] * len(
        events_of(tmp_path, "learner_lost")
    )
    rebuilt = events_of(tmp_path, "learner_rebuilt")
    assert rebuilt and all(e["updates_done"] == 1 for e in rebuilt)
    assert durable == [(step, True) for step in range(3)]  # nobody needs the last


def test_a_learner_lost_before_the_first_update_is_started_again(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    outcome = fakes(tmp_path, faults=(Fault("learner", "export", 1, "lose"),))
    assert story(outcome, tmp_path) == undisturbed()
    assert [e["during"] for e in events_of(tmp_path, "learner_lost")] == ["export"]
    (
        tmp_path / "checkpoints" / "step_000003" / "state.json"
    ).unlink()  # so that the run resumes from the one before
    again = fakes(tmp_path, resume=True, faults=(Fault("learner", "restore", 1, "lose"),))
    assert story(again, tmp_path) == undisturbed()


def test_a_learner_that_cannot_be_kept_alive_ends_the_run_and_what_was_done_is_kept(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    with pytest.raises(
        TrainingFailed, match=r"the learner was lost 3 times in update 1 .*--resume"
    ):
        fakes(
            tmp_path,
            "actors.infra_retries=2",
            faults=(Fault("learner", "learn", 2, "die_after", times=99),),
        )
    assert [e["update"] for e in events_of(tmp_path, "update_applied")] == [0]
    assert story(fakes(tmp_path, resume=True), tmp_path) == undisturbed()


def test_a_learner_whose_snapshot_is_gone_too_ends_the_run_and_says_how_to_continue(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    faults = (Fault("learner", "learn", 2, "lose"), Fault("learner", "restore", 1, "lose_blob"))
    with pytest.raises(TrainingFailed, match=r"state after update 1 .*--resume"):
        fakes(tmp_path, faults=faults)
    assert story(fakes(tmp_path, resume=True), tmp_path) == undisturbed()


# --- the driver dies: resume equality -------------------------------------------------------------


class CrashingObserver(SilentObserver):
    def update_done(self, metrics: dict[str, Any]) -> None:
        if metrics["update"] == 1:
            raise Crash


CRASHES: dict[str, tuple[Fault, ...]] = {
    "after rollout": (Fault("rollout", "run", 4, "crash_after"),),
    "after reward": (Fault("reward", "score", 4, "crash_after"),),
    "before learn": (Fault("learner", "learn", 2, "crash"),),
    "after learn": (Fault("learner", "learn", 2, "crash_after"),),
    "during commit": (),
    "after rename": (),
    "before publish": (Fault("rollout", "load", 2, "crash"),),
    "after publish": (),
}


@pytest.mark.parametrize(("lag", "every"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("point", CRASHES)
def test_a_driver_that_crashes_anywhere_continues_to_the_same_story(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Story],
    point: str,
    lag: int,
    every: int,
) -> None:
    overrides = (f"train.max_lag={lag}",)
    with monkeypatch.context() as patched:
        if point == "during commit":
            patched.setattr(
                checkpoint,
                "write_new",
                crashing(checkpoint.write_new, lambda path, content: "step_000002" in str(path)),
            )
        if point == "after rename":
            patched.setattr(
                checkpoint,
                "prune",
                crashing(
                    checkpoint.prune, lambda where, *rest, **more: (where / "step_000002").exists()
                ),
            )
        observer = CrashingObserver() if point == "after publish" else None
        with pytest.raises(Crash):
            fakes(
                tmp_path,
                *overrides,
                f"train.checkpoint_every={every}",
                faults=CRASHES[point],
                observer=observer,
            )
    outcome = fakes(tmp_path, *overrides, f"train.checkpoint_every={every}", resume=True)
    assert story(outcome, tmp_path) == undisturbed(*overrides)


def crashing(real: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        if when(*args, **more):
            raise Crash
        return real(*args, **more)

    return call


def test_a_stop_during_a_commit_waits_for_it_instead_of_writing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Story]
) -> None:
    """A thread that writes cannot be cancelled, so the commit at the end must not begin before it
    is done."""
    stopper, real, inside = StopAfter(99), checkpoint.write, threading.Semaphore()
    overlapping: list[bool] = []

    def slow(*args: Any, **more: Any) -> Path:
        overlapping.append(not inside.acquire(blocking=False))
        stopper.stop.request()
        threading.Event().wait(0.2)
        path = real(*args, **more)
        inside.release()
        return path

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr("runs.StopAfter", lambda updates: stopper)
    outcome = fakes(tmp_path)
    assert overlapping and not any(overlapping)
    assert outcome.updates_done == 1
    monkeypatch.undo()
    assert story(fakes(tmp_path, resume=True), tmp_path) == undisturbed()


# --- 11: two attempts in one directory ------------------------------------------------------------


class SecondAttempt(SilentObserver):
    """While the first attempt is held up at some point, another one resumes the run and finishes
    it."""

    def __init__(self, directory: Path, at: str) -> None:
        self.directory, self.at = directory, at
        self.stored: dict[str, bytes] = {}
        self.log: Story | None = None

    def group_scored(self, update: int, done: int, total: int) -> None:
        if self.at == "rolled out" and (update, done) == (1, total):
            self._overtake()

    def update_done(self, metrics: dict[str, Any]) -> None:
        if self.at == "published" and metrics["update"] == 0:
            self._overtake()

    def _overtake(self) -> None:
        def second() -> None:
            self.log = story(fakes(self.directory, resume=True), self.directory)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        self.stored = contents(self.directory)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("at", ["rolled out", "published"])
def test_of_two_attempts_in_one_directory_the_first_is_fenced_and_writes_nothing_more(
    tmp_path: Path, undisturbed: Callable[..., Story], at: str, every: int
) -> None:
    observer = SecondAttempt(tmp_path, at)
    with pytest.raises(Fenced, match=r"writes nothing more there and ends with exit code 75"):
        fakes(tmp_path, f"train.checkpoint_every={every}", observer=observer)
    assert observer.log == undisturbed()
    assert contents(tmp_path) == observer.stored


def test_a_fenced_command_leaves_with_75_and_touches_neither_record_nor_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"

    class Overtaken(FakeRollout):
        def load(self, blob: np.ndarray) -> AdapterId:
            if wire.unpack(blob).id.step == 1:
                Lease.take(run_dir)
                (run_dir / "run.json").write_text('{"of": "the newer attempt"}')
            return super().load(blob)

    monkeypatch.setattr(
        "actors.roles.worker_roles",
        lambda config, fields, learner: fake_roles(rollout=Overtaken)({}),
    )
    small_config(EDITOR, "editor.resolution=64", directory=tmp_path)
    code, _, (line,) = command(
        monkeypatch,
        capsys,
        "train",
        tmp_path / "run.yaml",
        "editor.resolution=64",
        "--run-dir",
        run_dir,
    )
    assert code == 75 and "ends with exit code 75" in line
    assert read_json(run_dir / "run.json") == {"of": "the newer attempt"}
    assert not (run_dir / "adapter").exists() and [
        line["update"] for line in metrics_of(run_dir)
    ] == [0]


# --- 12 to 15: checkpoints ------------------------------------------------------------------------


def full_disk(real: Callable[..., None], *steps: int) -> Callable[..., None]:
    def put(path: Path, content: bytes | memoryview) -> None:
        if any(f"step_{step:06d}" in str(path) for step in steps):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    return put


def test_a_full_disk_costs_a_checkpoint_and_a_warning_and_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Story]
) -> None:
    there: list[list[str]] = []

    class Looking(Notes):
        def update_done(self, metrics: dict[str, Any]) -> None:
            there.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("*")))

    notes = Looking()
    monkeypatch.setattr(checkpoint, "write_new", full_disk(checkpoint.write_new, 2))
    assert story(fakes(tmp_path, observer=notes), tmp_path) == undisturbed()
    (failed,) = events_of(tmp_path, "commit_failed")
    assert (failed["updates_done"], failed["in_a_row"]) == (2, 1) and "No space left" in failed[
        "reason"
    ]
    assert there == [[], ["step_000001"], ["step_000001"]]  # seen before each update's own commit
    assert [event["path"] for event in events_of(tmp_path, "checkpoint")] == [
        "step_000001",
        "step_000003",
    ]
    assert [
        note
        for note in notes.notes
        if "checkpoint of update 2 could not be written" in note and "intact" in note
    ]


def test_a_disk_that_stays_full_stops_the_run_with_the_remedy_and_then_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Story]
) -> None:
    overrides = ("train.updates=6",)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_new", full_disk(checkpoint.write_new, 2, 3, 4))
        with pytest.raises(
            ResourcesInfeasible,
            match=r"3 checkpoints in a row .*No space left.*free space.*--resume from update 1",
        ):
            fakes(tmp_path, *overrides, observer=Notes())
    assert [e["in_a_row"] for e in events_of(tmp_path, "commit_failed")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert story(fakes(tmp_path, *overrides, resume=True), tmp_path) == undisturbed(*overrides)


def test_a_disk_too_full_for_a_line_of_events_or_metrics_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = JsonLines.append

    def append(self: JsonLines, record: dict[str, Any]) -> None:
        if record.get("event") == "commit_failed" or record.get("update") == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, record)

    monkeypatch.setattr(checkpoint, "write_new", full_disk(checkpoint.write_new, 2))
    monkeypatch.setattr(JsonLines, "append", append)
    assert fakes(tmp_path, observer=Notes()).updates_done == 3


def test_a_crash_between_commit_and_publication_loses_no_line_of_metrics(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fakes(tmp_path, faults=CRASHES["before publish"])
    fakes(tmp_path, resume=True)
    assert [line["update"] for line in metrics_of(tmp_path)] == [0, 1, 2]


def cut(path: Path) -> None:
    content = (path / "learner.safetensors").read_bytes()
    (path / "learner.safetensors").write_bytes(content[: len(content) // 2])


def without_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


@pytest.mark.parametrize(
    "damage", [flip, cut, without_manifest], ids=lambda damage: damage.__name__
)
def test_a_bad_checkpoint_is_set_aside_and_the_run_ends_as_if_it_had_been_good(
    tmp_path: Path, undisturbed: Callable[..., Story], damage: Callable[[Path], object]
) -> None:
    fakes(tmp_path, stop_after=2)
    damage(tmp_path / "checkpoints" / "step_000002")
    assert story(fakes(tmp_path, resume=True), tmp_path) == undisturbed()
    (event,) = events_of(tmp_path, "checkpoint_corrupt")
    assert event["path"] == "step_000002"
    assert (tmp_path / "checkpoints" / ".corrupt-step_000002").is_dir()
    assert events_of(tmp_path, "resumed")[0]["updates_done"] == 1


def test_other_settings_are_refused_by_name_unless_their_drift_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "actors.roles.worker_roles", lambda config, fields, learner: fake_roles()({})
    )
    small_config(EDITOR, "editor.resolution=64", directory=tmp_path)
    base = ("train", tmp_path / "run.yaml", "editor.resolution=64", "--run-dir", tmp_path / "run")
    assert command(monkeypatch, capsys, *base)[0] == 0
    drifted = (*base, "--resume", "train.updates=4", "train.learning_rate=1e-4", "lora.rank=2")
    before = contents(tmp_path / "run")
    code, _, (line,) = command(monkeypatch, capsys, *drifted)
    assert (
        code == 2
        and "train.learning_rate: 0.005 there, 0.0001 here" in line
        and "lora.rank: 4 there, 2 here" in line
    )
    code, _, (line,) = command(monkeypatch, capsys, *drifted, "--allow-config-drift", "lora.rank")
    assert (
        code == 2 and "lora.rank" not in line and "--allow-config-drift train.learning_rate" in line
    )
    assert contents(tmp_path / "run") == before
    both = ("--allow-config-drift", "lora.rank", "--allow-config-drift", "train.learning_rate")
    assert command(monkeypatch, capsys, *drifted, *both)[0] == 0
    assert [line["update"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]


# --- 16, 17: weights that do not arrive, and no lock ----------------------------------------------


class Deaf(FakeRollout):
    """Says it has loaded what it is sent, and goes on with its first weights."""

    def load(self, blob: np.ndarray) -> AdapterId:
        weights = wire.unpack(blob)
        self.loaded.setdefault(weights.id, weights)
        return weights.id

    def run(self, blob: np.ndarray) -> Any:
        rolled, group = super().run(blob)
        return replace(rolled, adapter=min(self.loaded)), group


def test_an_actor_that_ignores_a_weight_update_is_caught_on_its_first_item(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="a weight update did not reach it"):
        fakes(tmp_path, "actors.infra_retries=0", rollout=Deaf)
    assert len(metrics_of(tmp_path)) == 1
    first = events_of(tmp_path, "result_stale")[0]
    assert (first["wanted"].split(":")[0], first["loaded"].split(":")[0], first["update"]) == (
        "1",
        "0",
        1,
    )


def test_one_actor_that_once_misses_an_update_is_replaced_and_its_result_is_not_used(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    old = Fault(
        "rollout",
        "run",
        3,
        "corrupt",
        change=lambda answer: (replace(answer[0], adapter=AdapterId(0, "0" * 64)), answer[1]),
    )
    assert story(fakes(tmp_path, faults=(old,)), tmp_path) == undisturbed()
    assert len(events_of(tmp_path, "result_stale")) == 1
    assert events_of(tmp_path, "actor_replaced")[0]["worker"] == "rollout-0.2"


def test_an_actor_on_which_an_adapter_changes_nothing_is_refused_before_the_first_update(
    tmp_path: Path,
) -> None:
    class Unattached(FakeRollout):
        def canary(self) -> str:
            return "the adapter changes nothing"

    with pytest.raises(
        TrainingFailed,
        match=r"preflight: rollout actor rollout-0\.1: the adapter changes nothing\. "
        r"Check lora\.targets",
    ):
        fakes(tmp_path, "actors.preflight=true", rollout=Unattached)
    assert events_of(tmp_path, "update_applied") == []


@pytest.mark.parametrize("kind", ["lose", "die_after", "hang"])
@pytest.mark.parametrize("lag", [0, 1])
def test_an_actor_that_dies_while_weights_are_sent_to_it_delays_no_other(
    tmp_path: Path, undisturbed: Callable[..., Story], lag: int, kind: Any
) -> None:
    overrides = (f"train.max_lag={lag}",)
    fault = Fault("rollout", "load", 2, kind, worker_slot=0)
    outcome = fakes(
        tmp_path, *overrides, "actors.num_rollout=2", "actors.deadline_s=0.2", faults=(fault,)
    )
    assert story(outcome, tmp_path) == undisturbed(*overrides)
    (lost,) = events_of(tmp_path, "actor_lost")
    assert lost["during"].startswith("publishing 1:")
    assert [e["worker"] for e in events_of(tmp_path, "actor_replaced")] == ["rollout-0.2"]


def test_a_replacement_that_cannot_load_the_weights_is_replaced_too(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    faults = (Fault("rollout", "run", 3, "lose"), Fault("rollout", "load", 3, "raise"))
    assert (
        story(fakes(tmp_path, "actors.quarantine_after=9", faults=faults), tmp_path)
        == undisturbed()
    )
    assert [e["during"] for e in events_of(tmp_path, "actor_lost")][1:] == ["replacement"]


@pytest.mark.parametrize(
    "fault",
    [Fault("rollout", "load", 2, "raise"), Fault("rollout", "load", 2, "lose_blob", times=999)],
    ids=["raises", "lost"],
)
def test_weights_that_no_actor_can_be_given_end_the_run_in_one_line_and_are_kept(
    tmp_path: Path, undisturbed: Callable[..., Story], fault: Fault
) -> None:
    with pytest.raises(TrainingFailed, match="--resume"):
        fakes(tmp_path, faults=(fault,))
    assert story(fakes(tmp_path, resume=True), tmp_path) == undisturbed()


def test_weights_that_one_actor_cannot_pull_cost_that_actor_and_not_the_run(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    # The second load is a broadcast; the third prepares the actor that replaces the first.
    outcome = fakes(tmp_path, faults=(Fault("rollout", "load", 2, "lose_blob", times=2),))
    assert story(outcome, tmp_path) == undisturbed()
    assert len(events_of(tmp_path, "actor_lost")) == 2


@pytest.mark.parametrize(
    "fault", [Fault("learner", "ratio", 1, "lose_blob"), Fault("learner", "ratio", 1, "lose")]
)
def test_what_is_lost_in_the_preflight_is_made_again(
    tmp_path: Path, undisturbed: Callable[..., Story], fault: Fault
) -> None:
    outcome = fakes(tmp_path, "actors.preflight=true", faults=(fault,))
    assert story(outcome, tmp_path) == undisturbed()
    event = "blob_lost" if fault.kind == "lose_blob" else "learner_lost"
    assert len(events_of(tmp_path, event)) == 1


# --- 18: bounded staleness never stops the run ----------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_bounded_staleness_never_livelocks_whatever_the_latencies(
    tmp_path: Path, undisturbed: Callable[..., Story], seed: int, lag: int
) -> None:
    overrides = (f"train.max_lag={lag}", "train.updates=6", "train.checkpoint_every=10")
    latency = random.Random(seed)
    slow = latency.choice(((0, 0.001), (0, 0.01), (0.004, 0.005)))
    outcome = fakes(
        tmp_path,
        *overrides,
        f"actors.num_rollout={1 + seed % 3}",
        executor=faulty(latency=lambda: latency.uniform(*slow)),
    )
    assert story(outcome, tmp_path) == undisturbed(*overrides)
    staleness = [line["staleness"] for line in metrics_of(tmp_path)]
    assert staleness == [min(update, lag) for update in range(6)]


# --- 19: late, repeated and differing results; blobs that are gone --------------------------------


def test_a_result_that_comes_late_is_used_once_and_its_repetition_is_no_conflict(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    outcome = fakes(tmp_path, "actors.deadline_s=0.1", faults=(Fault("rollout", "run", 2, "late"),))
    assert story(outcome, tmp_path) == undisturbed()
    assert events_of(tmp_path, "result_conflict") == []
    assert len(events_of(tmp_path, "actor_lost")) == 1


def test_a_repetition_with_other_bytes_is_reported_as_a_conflict_and_the_first_counts(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    def other(answer: Any) -> Any:
        return replace(answer[0], sha256="f" * 64), answer[1]

    outcome = fakes(
        tmp_path,
        "actors.deadline_s=0.1",
        faults=(Fault("rollout", "run", 2, "late", change=other),),
    )
    assert story(outcome, tmp_path) == undisturbed()
    (conflict,) = events_of(tmp_path, "result_conflict")
    assert conflict["update"] == 0 and conflict["sha256"] != "f" * 64


def test_a_late_result_of_work_whose_first_blob_was_lost_is_as_good_as_any(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    """Attempt 1 is late, attempt 2 is taken and its blob lost, attempt 1 arrives, attempt 3 repeats
    it."""
    faults = (Fault("rollout", "run", 1, "late", until=3), Fault("reward", "score", 1, "lose_blob"))
    overrides = ("train.groups_per_update=1",)
    outcome = fakes(
        tmp_path,
        *overrides,
        "actors.deadline_s=0.2",
        executor=faulty(*faults, latency=lambda: 0.01),
    )
    assert story(outcome, tmp_path) == undisturbed(*overrides)
    assert [e["event"] for e in read_json_lines(tmp_path / "events.jsonl")][1:4] == [
        "actor_lost",
        "actor_replaced",
        "blob_lost",
    ]


def test_a_group_whose_blob_is_gone_is_made_again(
    tmp_path: Path, undisturbed: Callable[..., Story]
) -> None:
    faults = (Fault("reward", "score", 2, "lose_blob"), Fault("learner", "learn", 3, "lose_blob"))
    assert story(fakes(tmp_path, faults=faults), tmp_path) == undisturbed()
    assert [e["update"] for e in events_of(tmp_path, "blob_lost")] == [0, 2]


def test_groups_are_made_again_beside_one_that_was_dropped(tmp_path: Path) -> None:
    """The learner finds a blob gone in an update that has already lost a group beyond its
    retries."""
    faults = (Fault("reward", "score", 1, "raise"), Fault("learner", "learn", 1, "lose_blob"))
    outcome = fakes(tmp_path, "train.max_dropped_groups=1", "actors.data_retries=0", faults=faults)
    assert outcome.updates_done == 3
    assert [e["update"] for e in events_of(tmp_path, "update_applied")] == [0, 1, 2]


@pytest.mark.parametrize(("role", "method"), [("reward", "score"), ("learner", "learn")])
def test_blobs_that_are_lost_again_and_again_end_the_run(
    tmp_path: Path, role: str, method: str
) -> None:
    with pytest.raises(TrainingFailed, match=r"lost .*3 times"):
        fakes(
            tmp_path,
            "actors.infra_retries=2",
            "train.groups_per_update=1",
            faults=(Fault(role, method, 1, "lose_blob", times=999),),
        )


# --- 22: what the nodes run -----------------------------------------------------------------------


def test_nodes_that_run_other_versions_are_named_with_what_differs() -> None:
    here = {"python": "3.11.9", "torch": "2.6.0", "rl-edit sources": "aaaaaaaaaaaa"}
    nodes = {
        "10.0.0.1": here,
        "10.0.0.3": {**here, "torch": "2.5.1"},
        "10.0.0.2": {"python": "3.11.9", "torch": "2.6.0"},
    }
    assert differences(nodes, here) == [
        "10.0.0.2 has rl-edit sources missing, here is aaaaaaaaaaaa",
        "10.0.0.3 has torch 2.5.1, here is 2.6.0",
    ]
    assert differences({"10.0.0.1": here}, here) == []


# --- everything at once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "share", "max_faults"),
    [*((seed, 0.2, 12) for seed in range(18)), *((seed, 0.4, 25) for seed in (1001, 1011))],
)
def test_random_faults_at_random_calls_never_change_the_story(
    tmp_path: Path, undisturbed: Callable[..., Story], seed: int, share: float, max_faults: int
) -> None:
    kind = random.Random(seed)
    chunks = kind.choice((("rollout.group_size=4",), ("rollout.group_size=8", "rollout.chunk=4")))
    overrides = (f"train.max_lag={seed % 2}", "train.updates=5", *chunks)
    slots = (
        f"actors.num_rollout={kind.choice((1, 2, 3))}",
        f"actors.num_reward={kind.choice((1, 2))}",
    )
    runtime = f"actors.runtime={kind.choice(('inline', 'thread'))}"
    outcome = fakes(
        tmp_path,
        *overrides,
        *PATIENT,
        *slots,
        runtime,
        "train.checkpoint_every=2",
        executor=chaos(seed, share=share, max_faults=max_faults),
    )
    assert story(outcome, tmp_path) == undisturbed(*overrides)
    assert [line["update"] for line in metrics_of(tmp_path)] == list(range(5))


# --- the document ---------------------------------------------------------------------------------


def test_every_test_that_the_table_of_promises_names_exists() -> None:
    document = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|", document, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 34)]
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", document)
    assert len(named) > 40
    absent = [
        f"{file}::{name}"
        for file, name in named
        if f"def {name}(" not in (ROOT / "tests" / file).read_text()
    ]
    assert absent == []
