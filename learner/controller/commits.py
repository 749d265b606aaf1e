"""Commits: checkpoints of the learner's snapshots, also on a disk that is full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from learner.controller import checkpoint
from learner.controller.executor import Executor, Ref
from learner.controller.learner_ranks import LearnerSnapshot
from learner.controller.lease import Lease
from learner.controller.ledger import Ledger
from rl_edit.config import RunConfig
from rl_edit.errors import ResourcesInfeasible, lacks_space
from rl_edit.method.update import TrainingFailed
from rl_edit.types import AdapterId

Acting = Mapping[int, tuple[AdapterId, Ref]]
"""Acting weights in use, by their update: the newest, and those that the lag still needs."""


class Commits:
    """Writes checkpoints of one run and remembers how far it is committed.

    Args:
        identity: the settings that decide results, and the hash of the sources; both go into
            checkpoints.
        note: called with what a person should know.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        *,
        identity: tuple[dict[str, object], str],
        executor: Executor,
        ledger: Ledger,
        lease: Lease,
        events: Callable[..., None],
        note: Callable[[str], None],
    ) -> None:
        self.config, self.directory, self.identity = config, directory, identity
        self.executor, self.ledger, self.lease = executor, ledger, lease
        self.events, self.note = events, note
        self.updates_done = 0
        self.failed_in_a_row = 0

    def is_due(self, updates_done: int) -> bool:
        """Returns True when a checkpoint follows so many updates."""
        train = self.config.train
        return updates_done % train.checkpoint_every == 0 or updates_done == train.updates

    async def require_space(self, snapshot: LearnerSnapshot) -> None:
        """Refuses a disk that cannot take a checkpoint, before hours of work could not be stored.

        Raises:
            ResourcesInfeasible: with the sizes.
        """
        state = await self.executor.fetch(snapshot.state)
        adapter = await self.executor.fetch(snapshot.adapter)
        problem = checkpoint.disk_space_problem(
            self.directory.parent, state.nbytes + adapter.nbytes
        )
        if problem:
            raise ResourcesInfeasible(f"{problem} Free space, or give another --run-dir.")

    async def commit(self, snapshot: LearnerSnapshot, acting: Acting) -> None:
        """Writes a checkpoint. A full disk costs a warning, and the next commit tries again.

        Args:
            acting: weights in use; those within the lag go into the checkpoint.

        Raises:
            TrainingFailed: too many checkpoints in a row, or the last one, could not be written.
            ResourcesInfeasible: the same, because the disk is full.
            Fenced: a newer attempt owns the run directory.
        """
        content = await self._content(snapshot, acting)
        # In a thread: syncing takes seconds, and rollouts of the next update go on meanwhile.
        writing = asyncio.ensure_future(
            asyncio.to_thread(checkpoint.write, self.directory, content, lease=self.lease)
        )
        try:
            path = await asyncio.shield(writing)
        except asyncio.CancelledError:
            # A thread cannot be cancelled, and the commit at the end must not write beside it.
            await asyncio.wait({writing})
            raise
        except OSError as error:
            self._failed(snapshot.updates_done, error)
            return
        # Only now is the update committed; a resumed run continues from here.
        self.failed_in_a_row, self.updates_done = 0, snapshot.updates_done
        try:
            checkpoint.prune(self.directory, self.config.train.keep_checkpoints, lease=self.lease)
        except OSError as error:
            # Too many checkpoints are no reason to stop; the next commit prunes again.
            self.events("prune_failed", reason=str(error))
        # A commit is also the sign of life that a later attempt reports.
        self.lease.renew()
        self.events("checkpoint", path=path.name, adapter=str(snapshot.id), chain=self.ledger.chain)

    async def _content(self, snapshot: LearnerSnapshot, acting: Acting) -> checkpoint.Checkpoint:
        """Fetches what a checkpoint of a snapshot holds."""
        done = snapshot.updates_done
        weights = {named.step: (named, ref) for named, ref in acting.values()}
        weights[done] = (snapshot.id, snapshot.adapter)
        # A resumed run rolls out its first groups with weights as old as the lag allows.
        needed = sorted(step for step in weights if step >= done - self.config.train.max_lag)
        settings, code_version = self.identity
        return checkpoint.Checkpoint(
            updates_done=done,
            settings=settings,
            code_version=code_version,
            ledger=self.ledger.state(),
            learner=await self.executor.fetch(snapshot.state),
            acting={
                weights[step][0]: await self.executor.fetch(weights[step][1]) for step in needed
            },
        )

    def _failed(self, updates_done: int, error: OSError) -> None:
        """Reports a checkpoint that could not be written.

        Raises:
            TrainingFailed, ResourcesInfeasible: too many in a row, or the last of the run.
        """
        train = self.config.train
        self.failed_in_a_row += 1
        self.events(
            "commit_failed",
            updates_done=updates_done,
            in_a_row=self.failed_in_a_row,
            reason=str(error),
        )
        self.note(
            f"checkpoint of update {updates_done} could not be written ({error}); "
            "the one before is intact"
        )
        if self.failed_in_a_row >= train.max_failed_commits or updates_done == train.updates:
            full = lacks_space(error)
            remedy = "free space" if full else "make it writable"
            failure = ResourcesInfeasible if full else TrainingFailed
            raise failure(
                f"{self.failed_in_a_row} checkpoints in a row could not be written to "
                f"{self.directory} ({error}): {remedy}, then continue with --resume from update "
                f"{self.updates_done}"
            ) from error
