"""The files of an evaluation: ``evaluation.json``, ``rows.jsonl`` and ``task.json``.

``rl-edit evaluate`` writes them; ``report``, ``compare`` and the benchmarks read them. Keys that a
reader does not know are ignored, and an older file may lack those that have a default here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from rl_edit.files import validated, without_nan
from rl_edit.measures.intervals import Interval

# The two editors of an evaluation: without the adapter, and with it. These are keys of all three
# files and names of PNG files, so they are the same word everywhere.
SIDES = ("base", "trained")


def interval_json(interval: Interval) -> dict[str, int | float | None]:
    """Writes an interval as JSON; an unknown end (only one task) is null."""
    written: dict[str, int | float | None] = without_nan(asdict(interval))
    return written


def _interval(value: Any) -> Any:
    """Reads ends that :func:`interval_json` writes as null; ``n`` is 0 where a file has none."""
    if not isinstance(value, Mapping):
        # An Interval, which is checked no further, or damage, which pydantic names.
        return value
    low, high = value.get("low"), value.get("high")
    return {
        "mean": value.get("mean"),
        "low": -math.inf if low is None else low,
        "high": math.inf if high is None else high,
        "n": value.get("n", 0),
    }


def _measured(value: Any) -> Any:
    """Leaves out metrics whose mean is no number: nothing was measured there."""
    if not isinstance(value, Mapping):
        return value

    def has_mean(entry: object) -> bool:
        # Entries that are no objects pass, so that pydantic refuses them by name.
        mean = entry.get("mean") if isinstance(entry, Mapping) else 0.0
        return isinstance(mean, int | float) and math.isfinite(mean)

    return {name: entry for name, entry in value.items() if has_mean(entry)}


Intervals = Annotated[
    Mapping[
        str,
        Annotated[Interval, BeforeValidator(_interval), PlainSerializer(interval_json)],
    ],
    BeforeValidator(_measured),
]
"""An interval for each metric, by name."""


class _File(BaseModel):
    # Unknown keys are ignored: a file of a newer version is read for what this version knows.
    model_config = ConfigDict(frozen=True, extra="ignore")


class EvaluationMeta(_File):
    """Settings under which an evaluation was made.

    Attributes:
        num_tasks: held-out tasks; ``num_noises`` of noises for each.
        seed: root of the noises.
        num_steps: solver steps.
        guidance, true_cfg, negative_prompt, max_text_tokens: None where the editor's family has
            none.
        tasks: sha256 over the tasks as they lie on the canvas.
        editor: identity of the base editor's weights.
        conventions: the definition of each measure, in words.
        adapter: id of the adapter, ``UPDATES:SHA256``.
        rewards: sha256 of each reward term's settings; None in files of older versions.
        left_out: reward terms that the data cannot feed.
    """

    # The order is that of the file. A field without a default must be there for a comparison;
    # PROTOCOL in evaluated_run.py names those that must be equal.
    num_tasks: int
    num_noises: int
    seed: int
    num_steps: int
    guidance: float | None
    true_cfg: float | None
    negative_prompt: str | None
    dtype: str
    max_text_tokens: int | None
    tasks: str
    editor: str
    conventions: Mapping[str, str] = {}
    adapter: str
    rewards: Mapping[str, str] | None = None
    left_out: tuple[str, ...] = ()

    @property
    def updates(self) -> int:
        """Updates behind the adapter."""
        return int(self.adapter.split(":")[0])


class Sides(_File):
    """Base and trained editor on the same tasks and noises, by metric.

    Attributes:
        delta: trained minus base, paired by task and noise.
    """

    base: Intervals = {}
    trained: Intervals = {}
    delta: Intervals = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics that either side has."""
        return tuple(dict.fromkeys((*self.delta, *self.base, *self.trained)))


class EvaluationRecord(Sides):
    """The content of ``evaluation.json``.

    Attributes:
        by_type: the same for the tasks of each type.
        meta: an :class:`EvaluationMeta` as JSON; an older file may have other keys.

    Example:
        ``{"base": {"reward": {"mean": 6.2, "low": 5.8, "high": 6.5, "n": 256}}, "trained": ...,
        "delta": ..., "by_type": {"add": {"base": ...}}, "meta": {"num_tasks": 256, ...}}``
    """

    by_type: Mapping[str, Sides] = {}
    # Kept as it is, not as an EvaluationMeta: the report shows the settings of any version.
    meta: Mapping[str, Any] = {}

    def complete_meta(self) -> EvaluationMeta | None:
        """Returns ``meta`` as a record; None where an older version left a needed key out."""
        # A missing key means another version, a wrong value means damage: only the latter is an
        # error here.
        fields = EvaluationMeta.model_fields.items()
        if any(field.is_required() and name not in self.meta for name, field in fields):
            return None
        return validated(EvaluationMeta, self.meta)


class Row(_File):
    """One line of ``rows.jsonl``: one task under one noise.

    Attributes:
        values: metric -> value for base and trained; NaN where a measurement failed.
    """

    task_id: str
    task_type: str
    values: Mapping[str, Mapping[str, float]]


class ExampleRecord(_File):
    """The content of an example's ``task.json``; ``metrics`` as in :class:`Row`."""

    # All have defaults: an example is worth drawing for its images alone.
    task_id: str = ""
    task_type: str = ""
    instruction: str = ""
    metrics: Mapping[str, Mapping[str, float | None]] = {}
