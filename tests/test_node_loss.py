"""A lost machine takes its workers and its arrays along: the controller's side of it, with fakes.

Real nodes are in ``benchmarks/two_nodes.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fakes import Fault, FaultyExecutor, fake_roles
from learner.controller.run import Outcome
from rl_edit.errors import BlobLost
from rl_edit.method.update import TrainingFailed
from runs import adapter_bytes, events_of, run_inline, small_config


class Losing(FaultyExecutor):
    """Loses arrays: those of the nth copy to the driver, and those that a late call waited for."""

    def __init__(
        self, inside: Any, faults: list[Fault], *, keep: int = 0, require: int = 0
    ) -> None:
        super().__init__(inside, faults)
        self.lost_copy, self.lost_arguments, self.copies = keep, require, 0

    async def keep(self, ref: Any) -> Any:
        self.copies += 1
        if self.copies == self.lost_copy:
            raise BlobLost("its machine is gone")
        return ref

    async def require(self, arguments: Any) -> None:
        self.lost_arguments -= 1
        if self.lost_arguments >= 0:
            raise BlobLost("its machine is gone")


def run(
    editor: str, directory: Path, *overrides: str, faults: tuple[Fault, ...] = (), **more: Any
) -> Outcome:
    return run_inline(
        small_config(editor, *overrides),
        directory,
        change=fake_roles(),
        executor=lambda inside: Losing(inside, list(faults), **more),
    )


@pytest.mark.parametrize("copy", [1, 2, 3, 4, 5])
def test_a_learner_whose_answer_is_lost_with_its_machine_makes_it_again(
    small_editor: str, tmp_path: Path, copy: int
) -> None:
    whole = run(small_editor, tmp_path / "whole")
    outcome = run(small_editor, tmp_path / "run", keep=copy)
    assert adapter_bytes(outcome) == adapter_bytes(whole)
    (lost,) = events_of(tmp_path / "run", "learner_lost")
    assert "its answer was lost with its machine" in lost["reason"]


@pytest.mark.parametrize("where", [("reward", "score"), ("learner", "learn")])
def test_a_call_that_waits_for_a_lost_array_ends_at_its_deadline_and_the_array_is_made_again(
    small_editor: str, tmp_path: Path, where: tuple[str, str]
) -> None:
    whole = run(small_editor, tmp_path / "whole")
    waits = Fault(*where, 2, "hang")
    outcome = run(
        small_editor, tmp_path / "run", "actors.deadline_s=0.3", faults=(waits,), require=1
    )
    assert adapter_bytes(outcome) == adapter_bytes(whole)
    assert len(events_of(tmp_path / "run", "blob_lost")) == 1


def test_a_run_in_which_nothing_finishes_any_more_saves_what_it_has_and_says_what_it_waited_for(
    small_editor: str, tmp_path: Path
) -> None:
    # The first update has two groups; everything after it hangs, and workers are never given up.
    hangs = Fault("rollout", "run", 3, "hang", times=10**6)
    settings = (
        "actors.deadline_s=0.2",
        "actors.stall_s=0.1",
        "actors.max_stalls=4",
        "actors.infra_retries=1000000",
        "actors.quarantine_after=1000000",
        "train.checkpoint_every=3",
    )
    with pytest.raises(
        TrainingFailed, match=r"nothing has finished for .*rollout of .* on rollout-0"
    ):
        run(small_editor, tmp_path, *settings, faults=(hangs,))
    assert (tmp_path / "checkpoints" / "step_000001").is_dir()


def test_a_learner_lost_between_its_restore_and_its_export_is_restored_again(
    small_editor: str, tmp_path: Path
) -> None:
    whole = run(small_editor, tmp_path / "whole")
    directory = tmp_path / "run"
    run_inline(small_config(small_editor), directory, change=fake_roles(), stop_after=1)
    run_inline(
        small_config(small_editor),
        directory,
        change=fake_roles(),
        resume=True,
        executor=lambda inside: Losing(inside, [Fault("learner", "export", 1, "lose")]),
    )
    outcome = run_inline(small_config(small_editor), directory, change=fake_roles(), resume=True)
    assert adapter_bytes(outcome) == adapter_bytes(whole)
