"""The learner's side of the loop, and a learner of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from learner.controller.executor import Ref
from learner.controller.learner_ranks import LearnerSnapshot, Shards
from rl_edit.errors import InputError, WorkFailed
from rl_edit.messages import LearnAnswer, LearnOrder, LearnReport
from rl_edit.method.update import TrainingFailed


class LearnerPort(Protocol):
    """The learner's side of the loop: :class:`LearnerRanks`, or one in this process."""

    @property
    def ranks(self) -> int: ...
    async def start(self) -> None: ...
    async def export(self, updates_done: int) -> LearnerSnapshot: ...
    async def restore(self, state: Ref) -> None: ...
    async def ratio(self, group: Ref) -> float: ...
    async def apply(
        self, order: LearnOrder, shards: Shards, snapshot: LearnerSnapshot
    ) -> tuple[LearnReport, LearnerSnapshot]: ...


@contextlib.contextmanager
def _as_worker() -> Iterator[None]:
    """Raises what the learner raises as a worker would: the run fails with a sentence."""
    try:
        yield
    except (InputError, TrainingFailed):
        # These mean the same on either side of a call.
        raise
    except Exception as error:
        raise WorkFailed(f"{type(error).__name__}: {error}") from error


class InProcessLearner:
    """A learner of this process. It cannot be lost apart from the run, so nothing supervises it.

    A debugger at the optimizer's step shows the loop, this class, the learner and the update.
    """

    ranks = 1

    def __init__(self, learner: Any, *, on_event: Callable[..., None]) -> None:
        self._learner, self.event = learner, on_event

    async def start(self) -> None:
        """Does nothing: there are no other ranks to join."""

    async def export(self, updates_done: int) -> LearnerSnapshot:
        with _as_worker():
            return LearnerSnapshot.of(updates_done, self._learner.export())

    async def restore(self, state: Ref) -> None:
        with _as_worker():
            self._learner.restore(state)

    async def ratio(self, group: Ref) -> float:
        with _as_worker():
            return float(self._learner.ratio(group))

    async def apply(
        self, order: LearnOrder, shards: Shards, snapshot: LearnerSnapshot
    ) -> tuple[LearnReport, LearnerSnapshot]:
        during = f"update {order.update}"
        try:
            with _as_worker():
                answer: LearnAnswer = self._learner.learn(order, *shards(self.ranks)[0])
        except WorkFailed as error:
            self.event("learner_failed", during=during, attempt=1, reason=str(error))
            raise TrainingFailed(f"the learner failed in {during}: {error}") from error
        return answer.report, LearnerSnapshot.of(order.update + 1, answer)
