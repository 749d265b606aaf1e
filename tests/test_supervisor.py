"""The supervisor on workers of a few lines: deadlines, pauses, seats that are given up, and who is
told."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from learner.controller.deadlines import LONGEST_BACKOFF_S, SHORTEST_DEADLINE_S
from learner.controller.supervisor import QUARANTINE_WINDOW_S, GivenUp, Supervisor
from rl_edit.config import ActorsConfig
from rl_edit.errors import (
    InputError,
    ResourcesInfeasible,
    WorkerLost,
    WorkerOutOfMemory,
    WorkFailed,
)
from rl_edit.method.update import TrainingFailed


class Scripted:
    """A worker that answers its seat's name, or does what its executor's script says next."""

    def __init__(self, executor: Puppets, name: str) -> None:
        self.executor, self.name, self.killed = executor, name, asyncio.Event()

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        if self.killed.is_set():
            raise WorkerLost("it is dead")
        step = self.executor.script.get(method, [])
        step_action = step.pop(0) if step else None
        if isinstance(step_action, BaseException):
            raise step_action
        if step_action == "hang":
            await self.killed.wait()
            raise WorkerLost("it was killed")
        if step_action == "late":
            await self.killed.wait()
        elif callable(step_action):
            step_action()
        await asyncio.sleep(0)
        return self.name

    def kill(self) -> None:
        self.killed.set()


class Puppets:
    """Workers by seat; ``script`` lists what calls of a method do, in order, before they begin to
    succeed."""

    def __init__(self, **script: list[Any]) -> None:
        self.script, self.spawned = script, 0

    def direct(self, role: str) -> None:
        return None

    async def require(self, arguments: Any) -> None:
        """Nothing is ever lost here."""

    def spawn(self, role: str, slot: int) -> Scripted:
        self.spawned += 1
        return Scripted(self, f"{role}-{slot}#{self.spawned}")

    def free(self) -> str:
        return "2 CPU"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Callable[[], None]:
        def later() -> None:
            self.now += seconds

        return later


class EventLog:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **details: Any) -> None:
        self.events.append((event, details))

    def names(self) -> list[str]:
        return [event for event, _ in self.events]


def supervised(
    puppets: Puppets,
    body: Callable[[Supervisor], Coroutine[Any, Any, Any]],
    *,
    slots: int = 1,
    clock: Clock | None = None,
    judge_timeout_s: float = 0.0,
    **actors: Any,
) -> tuple[Any, EventLog]:
    """What ``body`` gives with rollout seats open, and the events."""
    log = EventLog()

    async def run() -> Any:
        config = ActorsConfig(
            **{"runtime": "inline", "backoff_s": 0, "num_rollout": slots, **actors}
        )
        supervisor = Supervisor(
            puppets, config, on_event=log, clock=clock or Clock(), judge_timeout_s=judge_timeout_s
        )  # type: ignore[arg-type]
        supervisor.open("rollout", slots)
        return await body(supervisor)

    return asyncio.run(run()), log


async def work(supervisor: Supervisor, **more: Any) -> Any:
    return await supervisor.call("rollout", "the work", "run", **more)


# --- deadlines ------------------------------------------------------------------------------------


def test_a_deadline_is_five_times_the_usual_within_bounds_once_calls_were_timed() -> None:
    clock = Clock()

    async def body(supervisor: Supervisor) -> list[float]:
        seen = [supervisor.deadlines.limit_s("run")]
        for _ in range(4):
            await work(supervisor)
            seen.append(supervisor.deadlines.limit_s("run"))
        return [*seen, supervisor.deadlines.limit_s("learn"), supervisor.deadlines.limit_s("start")]

    script = [clock.passes(seconds) for seconds in (20, 70, 2, 1000)]
    seen, _ = supervised(
        Puppets(run=script), body, clock=clock, deadline_s=600, start_timeout_s=1800
    )
    usual = 20.0
    expected = [600.0, 5 * usual]
    for seconds in (70, 2, 1000):
        usual = 0.8 * usual + 0.2 * seconds
        expected.append(min(600.0, 5 * usual))
    assert seen == pytest.approx([*expected, 600.0, 1800.0])
    assert expected[-1] == 600.0


@pytest.mark.parametrize(
    ("judge_timeout_s", "expected"), [(0.0, 60.0), (363.0, 423.0), (900.0, 600.0)]
)
def test_scoring_is_not_ended_before_a_judge_elsewhere_has_been_given_up(
    judge_timeout_s: float, expected: float
) -> None:
    clock = Clock()

    async def body(supervisor: Supervisor) -> tuple[float, float]:
        for method in ("score", "run"):
            await supervisor.call("rollout", "a group", method)
        return supervisor.deadlines.limit_s("score"), supervisor.deadlines.limit_s("run")

    script = {"score": [clock.passes(2.0)], "run": [clock.passes(2.0)]}
    seen, _ = supervised(
        Puppets(**script), body, clock=clock, judge_timeout_s=judge_timeout_s, deadline_s=600
    )
    assert seen == (expected, 60.0)


def test_a_deadline_is_not_shorter_than_a_minute_unless_it_was_configured_so() -> None:
    async def body(supervisor: Supervisor) -> float:
        await work(supervisor)
        return supervisor.deadlines.limit_s("run")

    assert supervised(Puppets(), body, deadline_s=600)[0] == SHORTEST_DEADLINE_S
    assert supervised(Puppets(), body, deadline_s=5)[0] == 5


def test_a_call_dropped_with_its_worker_is_made_again_and_does_not_end_the_run() -> None:
    answer, log = supervised(Puppets(run=[asyncio.CancelledError()]), work)
    assert answer == "rollout-0#2"
    assert log.names() == ["actor_lost", "actor_replaced"]


def test_a_call_past_its_deadline_is_killed_and_made_again_by_the_next_incarnation() -> None:
    answer, log = supervised(Puppets(run=["hang"]), work, deadline_s=0.05)
    assert answer == "rollout-0#2"
    assert log.names() == ["actor_lost", "actor_replaced"]
    assert log.events[0][1]["reason"] == "no answer within 0.05 s, killed"
    assert (
        log.events[0][1]["worker"] == "rollout-0.1" and log.events[1][1]["worker"] == "rollout-0.2"
    )


def test_an_answer_past_its_deadline_is_shown_to_whoever_wants_it() -> None:
    shown: list[str] = []
    answer, _ = supervised(
        Puppets(run=["late"]),
        lambda supervisor: work(supervisor, late=shown.append),
        deadline_s=0.05,
    )
    assert (shown, answer) == (["rollout-0#1"], "rollout-0#2")


def test_calls_under_way_are_known_with_their_worker_and_age_oldest_first_and_forgotten_after() -> (
    None
):
    clock = Clock()

    async def body(supervisor: Supervisor) -> Any:
        calls = []
        for name in ("one", "two"):
            calls.append(asyncio.create_task(supervisor.call("rollout", name, "run")))
            await asyncio.sleep(0)
            clock.now += 3
        seen = [(call.what, call.worker, call.age_s) for call in supervisor.pending()]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return seen, supervisor.pending()

    (seen, after), _ = supervised(Puppets(run=["hang", "hang"]), body, slots=2, clock=clock)
    assert seen == [("one", "rollout-0.1", 6.0), ("two", "rollout-1.1", 3.0)]
    assert after == []


# --- retries --------------------------------------------------------------------------------------


def test_the_second_retry_waits_and_the_pause_doubles_up_to_its_longest() -> None:
    async def body(supervisor: Supervisor) -> list[float]:
        return [supervisor.deadlines.backoff_s(failures) for failures in (1, 2, 3, 4, 5, 20)]

    assert supervised(Puppets(), body, backoff_s=2)[0] == [0, 2, 4, 8, 16, LONGEST_BACKOFF_S]


def test_lost_workers_and_failed_work_have_budgets_of_their_own() -> None:
    script = [WorkerLost("gone"), WorkFailed("no"), WorkerLost("gone"), WorkFailed("no")]

    async def body(supervisor: Supervisor) -> Any:
        return await work(supervisor), supervisor.retries

    (answer, retries), log = supervised(
        Puppets(run=script), body, infra_retries=2, data_retries=2, quarantine_after=9
    )
    assert (answer, retries) == ("rollout-0#3", {"infra": 2, "data": 2})
    assert [
        details["attempt"]
        for event, details in log.events
        if event in ("actor_lost", "work_failed")
    ] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (WorkerLost("gone"), r"lost its worker 3 times \(actors\.infra_retries 2\): gone"),
        (WorkFailed("no"), r"failed 2 times .*: no"),
    ],
)
def test_work_that_spends_its_retries_is_given_up(error: Exception, says: str) -> None:
    with pytest.raises(GivenUp, match=f"the work {says}"):
        supervised(
            Puppets(run=[error] * 9), work, infra_retries=2, data_retries=1, quarantine_after=9
        )


def test_failed_work_keeps_its_worker_and_a_wrong_answer_costs_it() -> None:
    assert supervised(Puppets(run=[WorkFailed("no")]), work)[0] == "rollout-0#1"
    wrong = iter(["it answered about another item"])
    answer, log = supervised(
        Puppets(), lambda supervisor: work(supervisor, check=lambda answer: next(wrong, ""))
    )
    assert answer == "rollout-0#2"
    assert log.events[0][1]["reason"] == "it answered about another item"


def test_what_the_user_got_wrong_is_not_tried_again() -> None:
    puppets = Puppets(run=[InputError("a bad setting")])
    with pytest.raises(InputError, match="a bad setting"):
        supervised(puppets, work)
    assert puppets.spawned == 1


# --- seats ----------------------------------------------------------------------------------------


def test_a_slot_lost_too_often_is_closed_and_its_work_done_by_another() -> None:
    async def body(supervisor: Supervisor) -> Any:
        first, *_ = supervisor.worker_slots("rollout")
        for _ in range(2):
            await supervisor._replace("rollout", first, first.worker, "gone")
        return [await work(supervisor) for _ in range(3)], [
            slot.index for slot in supervisor.worker_slots("rollout")
        ]

    (responses, left), log = supervised(Puppets(), body, slots=2, quarantine_after=2)
    assert (responses, left) == (["rollout-1#2"] * 3, [1])
    assert log.events[-1] == (
        "seat_quarantined",
        {"role": "rollout", "worker": "rollout-0.2", "kills": 2, "left": 1},
    )


def test_losses_longer_ago_than_the_window_do_not_count() -> None:
    clock = Clock()

    async def body(supervisor: Supervisor) -> int:
        (slot,) = supervisor.worker_slots("rollout")
        for _ in range(5):
            await supervisor._replace("rollout", slot, slot.worker, "gone")
            clock.now += QUARANTINE_WINDOW_S / 2 + 1
        return slot.incarnation

    assert supervised(Puppets(), body, clock=clock, quarantine_after=3)[0] == 6


def test_a_worker_that_two_callers_find_lost_is_replaced_once() -> None:
    async def body(supervisor: Supervisor) -> int:
        (slot,) = supervisor.worker_slots("rollout")
        lost = slot.worker
        await asyncio.gather(
            *(supervisor._replace("rollout", slot, lost, "gone") for _ in range(3))
        )
        return slot.incarnation

    assert supervised(Puppets(), body)[0] == 2


@pytest.mark.parametrize(("slots", "minimum"), [(1, 1), (3, 3)])
def test_fewer_slots_than_the_minimum_end_the_run_for_everyone_who_waits(
    slots: int, minimum: int
) -> None:
    async def body(supervisor: Supervisor) -> list[Any]:
        return await asyncio.gather(
            *(work(supervisor) for _ in range(slots + 2)), return_exceptions=True
        )

    script = [WorkerLost("gone")] * 50
    responses, _ = supervised(
        Puppets(run=script),
        body,
        slots=slots,
        min_rollout=minimum,
        quarantine_after=1,
        infra_retries=99,
    )
    assert len(responses) == slots + 2
    for answer in responses:
        assert isinstance(answer, TrainingFailed)
        assert (
            f"fewer than actors.min_rollout {minimum}" in str(answer)
            and "(gone)" in str(answer)
            and "--resume" in str(answer)
        )


def test_a_replacement_is_prepared_before_it_works_and_replaced_when_that_fails() -> None:
    prepared: list[str] = []

    async def prepare(worker: Any) -> None:
        prepared.append(worker.name)
        if len(prepared) == 1:
            raise WorkFailed("it could not load")

    async def body(supervisor: Supervisor) -> Any:
        supervisor.open("reward", 1, prepare=prepare)
        return await supervisor.call("reward", "the work", "run")

    answer, log = supervised(Puppets(run=[WorkerLost("gone")]), body, quarantine_after=9)
    assert prepared == ["reward-0#3", "reward-0#4"] and answer == "reward-0#4"
    assert [details["reason"] for event, details in log.events if event == "actor_lost"] == [
        "gone",
        "it could not load",
    ]


def test_a_broadcast_reaches_every_slot_and_replaces_those_that_are_lost() -> None:
    async def body(supervisor: Supervisor) -> Any:
        return await supervisor.broadcast("rollout", "new weights", "load"), [
            slot.incarnation for slot in supervisor.worker_slots("rollout")
        ]

    (responses, incarnations), _ = supervised(
        Puppets(load=[None, WorkerLost("gone")]), body, slots=3
    )
    assert sorted(worker for worker, _ in responses) == ["rollout-0.1", "rollout-2.1"]
    assert incarnations == [1, 2, 1]


# --- the start ------------------------------------------------------------------------------------


def test_actors_that_do_not_start_in_time_are_refused_with_what_is_free() -> None:
    with pytest.raises(
        ResourcesInfeasible, match=r"not all of 2 actors .* 0\.05 s .*free are 2 CPU"
    ):
        supervised(
            Puppets(ready=[None, "hang"]),
            lambda supervisor: supervisor.ready(),
            slots=2,
            start_timeout_s=0.05,
        )


def test_an_actor_that_dies_while_it_starts_ends_the_run() -> None:
    with pytest.raises(TrainingFailed, match=r"ended while it was starting.* gone$"):
        supervised(Puppets(ready=[WorkerLost("gone")]), lambda supervisor: supervisor.ready())


@pytest.mark.parametrize(
    ("refusal", "raised", "words"),
    [
        (InputError("no such module 'to_qq'"), InputError, "^no such module 'to_qq'$"),
        (TrainingFailed("the reward: KeyError"), TrainingFailed, "^the reward: KeyError$"),
        (WorkFailed("ModuleNotFoundError: x"), TrainingFailed, "ModuleNotFoundError: x$"),
        (WorkerOutOfMemory("no memory: 80 GiB"), ResourcesInfeasible, r"80 GiB\. Lower actors"),
    ],
)
def test_what_a_constructor_raises_is_the_message_and_is_not_tried_again(
    refusal: Exception, raised: type[Exception], words: str
) -> None:
    # The second worker is lost in the same instant; the first one's reason counts.
    puppets = Puppets(ready=[refusal, WorkerLost("killed")])
    with pytest.raises(raised, match=words):
        supervised(puppets, lambda supervisor: supervisor.ready(), slots=2)
    assert puppets.spawned == 2


def test_a_start_that_is_cancelled_leaves_no_error_that_was_not_looked_at() -> None:
    complaints: list[str] = []

    async def body(supervisor: Supervisor) -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: complaints.append(context["message"])
        )
        starting = asyncio.create_task(supervisor.ready())
        await asyncio.sleep(0.01)
        # As when an executor closes: the workers are gone while the start is cancelled.
        for slot in supervisor.worker_slots("rollout"):
            slot.worker.kill()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        del starting
        gc.collect()
        await asyncio.sleep(0.01)

    supervised(Puppets(ready=["hang", "hang"]), body, slots=2)
    assert complaints == []
