"""Exploration: the law of a group's initial noises, the schedule of step noise, and where
randomness comes from.

Every draw is keyed by (run seed, task id, epoch, candidate) and made on the CPU in fp32, so a lost
group is recomputed bit for bit by any actor, whatever ran before on it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.types import SDE, RewardTable


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed from a keyed hash of the parts: order matters, neighbours share nothing."""
    digest = hashlib.blake2b(
        "\x1f".join(str(part) for part in parts).encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class NoiseSource:
    """Standard normals of one group, addressed by purpose and candidate rather than drawn from a
    stream."""

    run_seed: int
    task_id: str
    epoch: int

    def normal(
        self, purpose: str, candidate: int, shape: tuple[int, ...]
    ) -> Float[Tensor, "*shape"]:
        return torch.randn(shape, generator=self.generator(purpose, candidate), dtype=torch.float32)

    def generator(self, purpose: str, candidate: int = -1) -> torch.Generator:
        return torch.Generator().manual_seed(
            keyed_seed(self.run_seed, purpose, self.task_id, self.epoch, candidate)
        )


class Perturbation(BaseModel):
    """Neighbours of one shared noise: ``e_i = sqrt(1 - a^2) * e + a * d_i``, element-wise of unit
    variance.

    ``a`` is ``inside`` on tokens of the edit region and ``outside`` elsewhere: the region-decoupled
    map of RC-GRPO-Editing (arXiv 2604.09386, Eq. 10-11). With ``inside == outside`` it is Neighbor
    GRPO's global neighbourhood (arXiv 2511.16955, Eq. 7); with both 1 the candidates are
    independent; with both 0 they are one, as methods that explore by step noise start.

    Attributes:
        inside: spread in the edit region. Neighbor GRPO found 0.3 best of {.1, .2, .3, .5, .7} for
            whole images; the region-decoupled law moves less of the picture, and the presets'
            values were chosen on validation scenes (docs/decisions.md).
        outside: spread elsewhere; small but positive in the paper ("numerical stability").
        keep_reference: candidate 0 is the unperturbed shared noise (RC-GRPO-Editing); it sits at
            half the squared distance of two perturbed candidates, so it is never an anchor.
        background_pull: how far each step pulls tokens outside the mask back to where the reference
            candidate's are, 0 (not) to 1 (all the way). The perturbation is local at its start
            only: attention carries it into the background on the way. With 1 every candidate shows
            the reference's background; ours, the papers name the leak as open.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["perturbation"] = "perturbation"
    inside: float = Field(default=0.3, ge=0, le=1)
    outside: float = Field(default=0.02, ge=0, le=1)
    keep_reference: bool = True
    background_pull: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _possible(self) -> Perturbation:
        if self.background_pull > 0 and not self.keep_reference:
            raise ValueError(
                f"background_pull {self.background_pull:g} pulls backgrounds to the reference "
                "candidate's, and keep_reference is false: set it to true, "
                "or background_pull to 0."
            )
        return self

    @property
    def spreads(self) -> bool:
        """Whether candidates start apart."""
        return self.inside > 0 or self.outside > 0

    def at(self, state: Mapping[str, float], task_type: str) -> Perturbation:
        """The law for one task, given what was steered so far: this one."""
        return self

    def steered(
        self, state: Mapping[str, float], seen: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """What to explore with after an update, by task type: nothing is steered."""
        return {}

    def measured(
        self, state: Mapping[str, float], seen: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """Metrics of an update's exploration: none, because nothing is steered."""
        return {}

    @property
    def num_references(self) -> int:
        """Leading candidates that are not perturbed and hence cannot be anchors."""
        return int(self.keep_reference)

    def __call__(
        self,
        num_candidates: int,
        shape: tuple[int, int],
        mask: Bool[Tensor, " token"],
        source: NoiseSource,
    ) -> Float[Tensor, "group token channel"]:
        shared = source.normal("shared", -1, shape)
        spread = torch.where(mask, self.inside, self.outside)[:, None].float()
        keep = (1 - spread**2).sqrt()
        perturbed = [
            keep * shared + spread * source.normal("candidate", i, shape)
            for i in range(self.num_references, num_candidates)
        ]
        return torch.stack([shared] * self.num_references + perturbed)


def pull_background(
    states: Float[Tensor, "group token channel"],
    mask: Bool[Tensor, " token"],
    background_pull: float,
) -> Float[Tensor, "group token channel"]:
    """States whose tokens outside the mask have moved by ``background_pull`` of the way to those of
    the first, the reference candidate."""
    home = (
        states[:1].lerp(states, 1 - background_pull)
        if background_pull < 1
        else states[:1].expand_as(states)
    )
    return torch.where(mask[None, :, None].to(states.device), states, home)


class AdaptiveSpread(BaseModel):
    """A perturbation whose in-mask spread is steered so that a group's scores differ neither too
    little nor too much.

    Candidates that all succeed or all fail teach nothing, and the spread that separates them
    differs by kind of edit. After each update the spread of every task type is multiplied by
    ``exp(rate)`` when the mean within-group deviation of the watched score lay below ``band`` and
    divided by it when it lay above. The state travels with the adapter. Ours; the papers fix the
    spread.

    Attributes:
        start: the law to begin with; its ``inside`` is what is steered.
        watch: reward term, or component of one (``judge.instruction``), whose within-group
            deviation is steered.
        band: wanted deviation (low, high), in the unit of the watched score.
        rate: largest change of the logarithm of the spread per update.
        min_spread, max_spread: bounds of the spread.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["adaptive"] = "adaptive"
    start: Perturbation = Perturbation()
    watch: str = "judge.instruction"
    band: tuple[float, float] = (0.8, 1.6)
    rate: float = Field(default=0.05, gt=0)
    min_spread: float = Field(default=0.05, gt=0, le=1)
    max_spread: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _possible(self) -> AdaptiveSpread:
        if not 0 <= self.band[0] < self.band[1]:
            raise ValueError(
                f"band {self.band} is not (low, high) with 0 <= low < high: give a wanted range of "
                "deviations."
            )
        if not self.min_spread <= self.start.inside <= self.max_spread:
            raise ValueError(
                f"start.inside {self.start.inside:g} lies outside "
                f"{self.min_spread:g}..{self.max_spread:g} (min_spread..max_spread): move it or "
                "them."
            )
        return self

    @property
    def num_references(self) -> int:
        return self.start.num_references

    @property
    def spreads(self) -> bool:
        return True

    @property
    def background_pull(self) -> float:
        return self.start.background_pull

    @property
    def watched_term(self) -> str:
        """The reward term of :attr:`watch`."""
        return self.watch.partition(".")[0]

    def at(self, state: Mapping[str, float], task_type: str) -> Perturbation:
        """The law for one task: its type's spread so far, else the one to begin with."""
        return self.start.model_copy(update={"inside": state.get(task_type, self.start.inside)})

    def steered(
        self, state: Mapping[str, float], seen: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """The spreads after an update, by task type.

        Args:
            state: the spreads of the update's groups.
            seen: (task type, reward table) of each group; groups in which the watched score is
                missing say nothing.

        Raises:
            InputError: when nothing was steered yet and the watched term, although it scored, gives
                no such component.
        """
        result, deviations = dict(state), self._deviations(seen)
        given = [
            table
            for _, table in seen
            if self.watched_term in table.names and table.complete(self.watched_term)
        ]
        if given and not state and not deviations:
            scores = {
                f"{self.watched_term}.{part}"
                for table in given
                for part in table.columns(self.watched_term)
            }
            raise InputError(
                f"algorithm.initial_noise.watch {self.watch!r} is no score of reward "
                f"{self.watched_term!r}: nothing would be steered. It "
                f"has {', '.join([self.watched_term, *sorted(scores)])}."
            )
        for task_type, deviation in deviations.items():
            direction = (deviation < self.band[0]) - (deviation > self.band[1])
            spread = state.get(task_type, self.start.inside) * math.exp(self.rate * direction)
            result[task_type] = min(max(spread, self.min_spread), self.max_spread)
        return result

    def measured(
        self, state: Mapping[str, float], seen: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """Metrics of an update's exploration: by task type the spread before it was steered, and
        the mean within-group deviation.

        With ``train.max_lag`` 1 the groups were rolled out under the spread of one update earlier.
        """
        found = self._deviations(seen)
        spreads = {
            f"exploration/{task_type}/inside": state.get(task_type, self.start.inside)
            for task_type in found
        }
        return {
            **spreads,
            **{f"exploration/{task_type}/deviation": value for task_type, value in found.items()},
        }

    def _deviations(self, seen: Sequence[tuple[str, RewardTable]]) -> dict[str, float]:
        """Mean within-group deviation of the watched score by task type; types of which no group
        has the score are left out."""
        deviations: dict[str, list[float]] = {}
        for task_type, table in seen:
            scores = _watched(table, self.watch)
            if scores is not None:
                deviations.setdefault(task_type, []).append(float(scores.std(correction=0)))
        return {task_type: sum(values) / len(values) for task_type, values in deviations.items()}


def _watched(table: RewardTable, name: str) -> Float[Tensor, " group"] | None:
    """A term's or component's scores; None when the table lacks them or some candidate has none."""
    term, _, part = name.partition(".")
    if term not in table.names:
        return None
    if not part:
        scores = table.values[:, table.names.index(term)].double()
    elif part in (columns := table.columns(term)):
        scores = torch.tensor(columns[part], dtype=torch.float64)
    else:
        return None
    return scores if bool(scores.isfinite().all()) else None


def _perturbation_unless_said(value: Any) -> Any:
    return {"kind": "perturbation", **value} if isinstance(value, Mapping) else value


InitialNoise = Annotated[
    Perturbation | AdaptiveSpread,
    Field(discriminator="kind"),
    BeforeValidator(_perturbation_unless_said),
]
"""Seam: the initial noises of a group."""


class NoStepNoise(BaseModel):
    """Deterministic rollouts: the probability-flow ODE at every step."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["none"] = "none"

    @property
    def sde(self) -> SDE:
        """The law of stochastic steps, of which there are none."""
        return "flow"

    def __call__(self, update: int, num_steps: int) -> Float[Tensor, " step"]:
        """SDE level of each rollout step of an update."""
        return torch.zeros(num_steps)

    def check(self, num_steps: int) -> None:
        """Raises ValueError for a schedule the law does not fit."""


class ConstantNoise(BaseModel):
    """Stochastic steps all along, but for the last (Flow-GRPO, arXiv 2505.05470): its density is
    too sharp to be a policy.

    Attributes:
        level: a of ``flow.moments``. 0.7 in Flow-GRPO; 0.9 for FLUX.1-Kontext, 1.0 for
            Qwen-Image-Edit in its released configs.
        sde: which law.
        skip_last: trailing steps that stay deterministic (the released ``timestep_fraction`` 0.99).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["constant"] = "constant"
    level: float = Field(default=0.7, gt=0)
    sde: SDE = "flow"
    skip_last: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> ConstantNoise:
        _require_level(self.sde, self.level)
        return self

    def __call__(self, update: int, num_steps: int) -> Float[Tensor, " step"]:
        levels = torch.full((num_steps,), self.level)
        levels[num_steps - self.skip_last :] = 0
        return levels

    def check(self, num_steps: int) -> None:
        if self.skip_last >= num_steps:
            raise ValueError(
                f"algorithm.step_noise.skip_last {self.skip_last} leaves no stochastic step of "
                f"rollout.num_steps {num_steps}: "
                "lower it, or roll out more steps."
            )


class NoiseWindow(BaseModel):
    """Stochastic steps in a window that moves over the updates, the ODE elsewhere (MixGRPO, arXiv
    2507.21802; Flow-GRPO-Fast).

    Attributes:
        level, sde: as in :class:`ConstantNoise`.
        size: steps in the window.
        schedule: how its first step moves. "progressive": by ``stride`` every ``every`` updates;
            "exponential": it stays ``every * exp(-decay * max(position - threshold, 0))`` updates
            (rounded up) at each position, so that later steps get less; "random": anew for each
            update; "fixed": never.
        every: updates at a position, of the progressive and the exponential schedule.
        stride: steps between two positions.
        decay: of the exponential schedule.
        threshold: position from which the exponential schedule shortens its stays.
        first, stop: window starts lie in ``[first, stop - size]``; ``stop`` None ends two steps
            before the end, as released. Past the last start, which a long stride does not leap
            over, the window rolls back to ``first``. It never shrinks and is never empty.
        seed: of the random schedule: a function of the update, so that every actor draws the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["window"] = "window"
    level: float = Field(default=0.7, gt=0)
    sde: SDE = "flow"
    size: int = Field(default=4, ge=1)
    schedule: Literal["progressive", "exponential", "random", "fixed"] = "progressive"
    every: int = Field(default=25, ge=1)
    stride: int = Field(default=1, ge=1)
    decay: float = Field(default=0.1, ge=0)
    threshold: int = Field(default=13, ge=0)
    first: int = Field(default=0, ge=0)
    stop: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> NoiseWindow:
        _require_level(self.sde, self.level)
        return self

    def starts(self, num_steps: int) -> range:
        """Where the window may start."""
        stop = max(num_steps - 2, 1) if self.stop is None else self.stop
        return range(self.first, stop - self.size + 1)

    def start(self, update: int, num_steps: int) -> int:
        """Where the window of an update starts."""
        starts = self.starts(num_steps)
        if self.schedule == "fixed":
            return starts[0]
        if self.schedule == "random":
            seed = keyed_seed(self.seed, "window", update)
            return starts[
                int(torch.randint(len(starts), (), generator=torch.Generator().manual_seed(seed)))
            ]
        # The last whole window is always one of them, so that a cycle leaves no step out.
        positions = sorted({*starts[:: self.stride], starts[-1]})
        stays = [self._stay(position) for position in positions]
        left = update % sum(stays)
        for position, stay in zip(positions, stays, strict=True):
            if left < stay:
                return int(position)
            left -= stay
        raise AssertionError("the remainder of a sum is below it")

    def _stay(self, position: int) -> int:
        if self.schedule == "progressive":
            return self.every
        return max(
            1, math.ceil(self.every * math.exp(-self.decay * max(position - self.threshold, 0)))
        )

    def __call__(self, update: int, num_steps: int) -> Float[Tensor, " step"]:
        start = self.start(update, num_steps)
        levels = torch.zeros(num_steps)
        levels[start : start + self.size] = self.level
        return levels

    def check(self, num_steps: int) -> None:
        stop = max(num_steps - 2, 1) if self.stop is None else self.stop
        if stop > num_steps - 1:
            raise ValueError(
                f"algorithm.step_noise.stop {stop} reaches the last of rollout.num_steps "
                f"{num_steps}, whose density is too sharp to train: "
                f"use at most {num_steps - 1}."
            )
        if not self.starts(num_steps):
            raise ValueError(
                f"algorithm.step_noise.size {self.size} does not fit between step {self.first} and "
                f"step {stop} of rollout.num_steps "
                f"{num_steps}: use a smaller window or roll out more steps."
            )


def _require_level(sde: SDE, level: float) -> None:
    if sde == "cps" and level > 1:
        raise ValueError(
            f"level {level:g} with sde 'cps' is beyond 1, where all noise is fresh: use at most 1."
        )


StepNoise = Annotated[NoStepNoise | ConstantNoise | NoiseWindow, Field(discriminator="kind")]
"""Seam: SDE level of each rollout step, ``(update, num_steps) -> [step]``, and the law of the
stochastic ones."""
