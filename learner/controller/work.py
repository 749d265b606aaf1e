"""The work of a run: tasks of slots, and their work items.

Everything follows from the position and the run's seed. A resumed run, another number of actors and
a single process therefore do the same work.
"""

from __future__ import annotations

import torch

from rl_edit.config import RunConfig
from rl_edit.data import Dataset
from rl_edit.data.canvas import fit
from rl_edit.method.exploration import keyed_seed
from rl_edit.types import AdapterId, EditTask, WorkItem


class TaskCursor:
    """Finds the task of a slot of an update, in shuffled epochs of the data set.

    Each epoch's order comes from a keyed seed, so there is no state besides the position.
    """

    def __init__(self, dataset: Dataset, *, seed: int, groups_per_update: int) -> None:
        self._dataset, self._seed, self._per_update = dataset, seed, groups_per_update
        self._order: tuple[int, list[int]] = (-1, [])

    def at(self, update: int, slot: int) -> tuple[EditTask, int]:
        """Returns the task, and its epoch: the number of times that it was used before."""
        # Slots of all updates form one sequence, so a data set need not divide into updates.
        epoch, position = divmod(update * self._per_update + slot, len(self._dataset))
        if self._order[0] != epoch:
            # Only the newest order is kept: with a lag of one update, positions hardly go back.
            generator = torch.Generator().manual_seed(keyed_seed(self._seed, "order", epoch))
            self._order = (epoch, torch.randperm(len(self._dataset), generator=generator).tolist())
        return self._dataset[self._order[1][position]], epoch


class WorkPlan:
    """Makes the work item of every group of a run, with its task fitted to the editor's canvas.

    Args:
        pixels_per_token: edge of an image token; the canvas is a multiple of it.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, *, pixels_per_token: int) -> None:
        self._config, self._pixels_per_token = config, pixels_per_token
        self._cursor = TaskCursor(
            dataset, seed=config.seed, groups_per_update=config.train.groups_per_update
        )

    def item(self, update: int, slot: int, adapter: AdapterId) -> WorkItem:
        """Returns the item of a complete group, to be rolled out with an adapter."""
        config = self._config
        task, epoch = self._cursor.at(update, slot)
        task = fit(task, resolution=config.editor.resolution, multiple=self._pixels_per_token)
        # The name is a keyed hash: without a clock or a process in it, an item can be made again.
        name = keyed_seed(config.seed, "work", update, slot, task.task_id, epoch)
        return WorkItem(
            group_id=f"{name:016x}",
            chunk=(0, config.rollout.group_size),
            task=task,
            epoch=epoch,
            update=update,
            num_candidates=config.rollout.group_size,
            run_seed=config.seed,
            adapter=adapter,
        )
