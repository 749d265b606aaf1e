"""Model evaluations of an update: the count of every method, and the forwards of a real update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rl_edit.config import load_config
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.evaluation.effort import effort
from runs import run_inline, small_config


@pytest.mark.parametrize(
    ("preset", "learning"),
    [
        ("tiny-rc-grpo", 4 * 6),  # anchors x trained steps
        ("tiny-neighbor-grpo", 4 * 4),
        ("tiny-flow-grpo", 8 * 5),  # every candidate at every stochastic step
        ("tiny-flow-grpo-fast", 8 * 2),
        ("tiny-mixgrpo", 8 * 2),
        ("tiny-diffusion-nft", 8 * 5 * 3),  # policy, acting and base
        ("tiny-cocoedit", 8 * 5 * 3),
        ("tiny-spatialflow-grpo", 8 * 5),
        ("tiny-edit-grpo", 8 * 5),
    ],
)
def test_an_update_costs_the_rollouts_forwards_and_every_replayed_state_under_every_policy(
    preset: str, learning: int
) -> None:
    update = effort(load_config(preset=preset))
    assert (update.rollout, update.learning) == (8 * 8 * 6, 8 * learning)
    assert (
        effort(
            load_config(
                preset=preset, overrides=["train.inner_epochs=2", "train.states_per_forward=3"]
            )
        ).learning
        == 2 * 8 * learning
    )
    if learning == 8 * 5 * 3:  # a guided velocity is none to regress on samples
        return
    guided = effort(load_config(preset=preset, overrides=["editor.true_cfg=2"]))
    assert (guided.rollout, guided.learning) == (2 * update.rollout, 2 * update.learning), (
        "a forward of either prompt"
    )


TRANSITION = "algorithm={name: flow-grpo, credit: {normalise: group}}"
FORWARD = "algorithm={name: diffusion-nft, credit: {normalise: group}}"
REGULARISED = (
    "algorithm.objective={kind: background_regularised, target: reference, "
    "inner: {num_anchors: 2, num_steps: 1}}"
)


@pytest.mark.parametrize("method", ["train.inner_epochs=1", TRANSITION, FORWARD, REGULARISED])
def test_the_counted_evaluations_are_the_forwards_of_a_real_update(
    method: str, small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small_editor, "train.updates=1", method)
    states: list[int] = []
    velocity = FluxKontextEditor.velocity

    def counted(self: Any, latents: Tensor, *rest: Any) -> Tensor:
        states.append(len(latents))
        return velocity(self, latents, *rest)

    monkeypatch.setattr(FluxKontextEditor, "velocity", counted)
    run_inline(config, tmp_path)
    assert sum(states) == effort(config).total
