"""Reports silent terms while a run trains, and ends the run when one stays silent.

A judge that answers the same for every image is the usual cause: the run then trains what is left,
such as preservation, and would end well. What counts as silent is decided in
:mod:`rl_edit.measures.silence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learner.controller.run import Run
from rl_edit.config import RunConfig
from rl_edit.files import METRICS, read_json_lines
from rl_edit.measures.silence import Silence, silence
from rl_edit.method.update import TrainingFailed
from rl_edit.rewards import Reward

SILENT = "silent_reward"
"""The event of a term that has been silent for ``train.warn_silent`` updates."""


def silences(lines: Sequence[dict[str, Any]], config: RunConfig) -> list[Silence]:
    """Returns the weighted terms that are silent after the last line of ``metrics.jsonl``."""
    # Credit by region reads scores by region: these may differ where their sum does not.
    regional = config.algorithm.credit.needed_components()
    checked = (
        silence(
            lines,
            name,
            parts=[f"component/{name}.region.", f"component/{name}.background"]
            if name in regional
            else (),
        )
        for name, term in config.rewards.items()
        if term.weight > 0
    )
    return [silent for silent in checked if silent is not None]


def watch(run: Run, *, events: Callable[..., None], note: Callable[[str], None]) -> None:
    """Looks at the updates so far: warns once of a silence, and ends the run in the end.

    Raises:
        TrainingFailed: a term was silent for ``train.max_silent`` updates in a row.
    """
    lines = read_json_lines(run.directory / METRICS)
    config, train = run.config, run.config.train
    for silent in silences(lines, config):
        # Reported once, when it is reached, not again while it lasts. A shorter run reports it at
        # its end.
        if silent.updates == min(train.warn_silent, train.updates):
            ends = "" if _is_solved(silent, config) else _when_it_ends(config)
            events(
                SILENT,
                update=lines[-1]["update"],
                reward=silent.name,
                updates=silent.updates,
                mean=[silent.low, silent.high],
            )
            note(f"{silent}. {_cause(silent, config.rewards[silent.name])}{ends}")
        if train.max_silent is not None and silent.updates >= train.max_silent:
            _end(silent, config)


def require_informative(directory: Path, config: RunConfig) -> None:
    """Refuses to end well when a weighted term varied in no update of the run.

    Raises:
        TrainingFailed: with the name of the term; not in runs shorter than ``train.warn_silent``.
    """
    lines, train = read_json_lines(directory / METRICS), config.train
    for silent in silences(lines, config):
        never = not silent.varied_before and silent.updates >= train.warn_silent
        if train.max_silent is not None and never:
            _end(silent, config)


def _end(silent: Silence, config: RunConfig) -> None:
    if _is_solved(silent, config):
        return
    raise TrainingFailed(
        f"{silent}. {_cause(silent, config.rewards[silent.name])} Checkpoints stay. To train on "
        "nevertheless: --resume train.max_silent=null"
    )


def _is_solved(silent: Silence, config: RunConfig) -> bool:
    """Tests for a term that was learnt: it varied before, and every candidate is now the best."""
    return silent.varied_before and silent.low >= _best(config.rewards[silent.name])


def _best(term: Reward) -> float:
    # The table holds the negated value of a term that is better when lower.
    return -term.low if term.lower_is_better else term.high


def _cause(silent: Silence, term: Reward) -> str:
    """Says the likely cause and what to do about it."""
    worst = -term.high if term.lower_is_better else term.low
    if silent.same_images:
        return (
            "The candidates of a group are alike themselves: raise algorithm.initial_noise, or "
            "give algorithm.step_noise."
        )
    if silent.varied_before and silent.low >= _best(term):
        return "It varied before, and now every candidate has its best score: it may be learnt."
    remedy = f"Look at its answers with rl-edit audit-reward --term {term.name}"
    if silent.low >= _best(term):
        return (
            f"It is the best score there is, from the first update on. {remedy}, or set weight 0."
        )
    if silent.high <= worst:
        return (
            "It is the worst score there is: the edits may all be wrong, or the judge may not see "
            f"them. {remedy}; if they are wrong, use easier tasks or another editor."
        )
    return f"A judge that answers the same for every image does this. {remedy}, or set weight 0."


def _when_it_ends(config: RunConfig) -> str:
    train = config.train
    if train.max_silent is None:
        return ""
    last = min(train.max_silent, max(train.updates, train.warn_silent))
    return f" The run ends at {last} such updates (train.max_silent)."
