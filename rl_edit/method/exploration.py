"""Exploration: initial noises of a group, and where randomness comes from.

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
from rl_edit.types import RewardTable


def keyed_seed(*parts: object) -> int:
    """Hashes the parts to a 63-bit seed: order matters, neighbours share nothing."""
    # The separator keeps ("1", "23") and ("12", "3") apart.
    digest = hashlib.blake2b(
        "\x1f".join(str(part) for part in parts).encode(), digest_size=8
    ).digest()
    # torch takes a seed as a signed 64-bit number, so one bit is dropped.
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class NoiseSource:
    """Standard normals of one group, addressed by purpose and candidate.

    No draw depends on the ones before it: a chunk of candidates is rolled out anywhere.
    """

    run_seed: int
    task_id: str
    epoch: int

    def normal(
        self, purpose: str, candidate: int, shape: tuple[int, ...]
    ) -> Float[Tensor, "*shape"]:
        # On the CPU and in fp32 whatever the actor's device is: the same bits on every machine.
        return torch.randn(shape, generator=self.generator(purpose, candidate), dtype=torch.float32)

    def generator(self, purpose: str, candidate: int = -1) -> torch.Generator:
        return torch.Generator().manual_seed(
            keyed_seed(self.run_seed, purpose, self.task_id, self.epoch, candidate)
        )


class Perturbation(BaseModel):
    """Neighbours of one shared noise, ``e_i = sqrt(1 - a^2) * e + a * d_i``.

    Each has unit variance per element. ``a`` is ``inside`` on tokens of the edit region and
    ``outside`` elsewhere: the region-decoupled map of RC-GRPO-Editing (arXiv 2604.09386, Eq.
    10-11). With ``inside == outside`` it is Neighbor GRPO's global neighbourhood (arXiv 2511.16955,
    Eq. 7); with both 1 the candidates are independent; with both 0 they are one, as methods that
    explore by step noise start.

    Attributes:
        inside: spread in the edit region. Neighbor GRPO found 0.3 best of {.1, .2, .3, .5, .7} for
            whole images; the region-decoupled law moves less of the image, and the presets'
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
        # Without a reference there is no state that the background could be pulled to.
        if self.background_pull > 0 and not self.keep_reference:
            raise ValueError(
                f"background_pull {self.background_pull:g} pulls backgrounds to the reference "
                "candidate's, and keep_reference is false: set it to true, "
                "or background_pull to 0."
            )
        return self

    @property
    def spreads(self) -> bool:
        """True when candidates start apart."""
        return self.inside > 0 or self.outside > 0

    def at(self, state: Mapping[str, float], task_type: str) -> Perturbation:
        """Returns the law for one task: this one, whatever was steered so far."""
        return self

    def steered(
        self, state: Mapping[str, float], tables: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """Returns the state after an update: nothing is steered."""
        return {}

    def measured(
        self, state: Mapping[str, float], tables: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """Returns metrics of an update's exploration: none, because nothing is steered."""
        return {}

    @property
    def num_references(self) -> int:
        """Counts leading candidates that are not perturbed and hence cannot be anchors."""
        return int(self.keep_reference)

    def __call__(
        self,
        num_candidates: int,
        shape: tuple[int, int],
        mask: Bool[Tensor, " token"],
        source: NoiseSource,
    ) -> Float[Tensor, "group token channel"]:
        """Draws the initial noises of a group; ``mask`` is True in the edit region."""
        shared = source.normal("shared", -1, shape)
        # Eq. 10-11: a per token, and sqrt(1 - a^2) so that the sum keeps unit variance. A state of
        # another variance would not lie on the editor's noise level sigma = 1.
        spread = torch.where(mask, self.inside, self.outside)[:, None].float()
        keep = (1 - spread**2).sqrt()
        # Draws are addressed by the index in the group: a chunk's bits are its group's.
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
    """Moves tokens outside the mask to those of the first candidate, the reference.

    ``background_pull`` is the part of the way: ``x_0 + (1 - pull) (x_i - x_0)``.
    """
    # At 1 the reference's tokens are taken as they are: interpolation would round them.
    reference = (
        states[:1].lerp(states, 1 - background_pull)
        if background_pull < 1
        else states[:1].expand_as(states)
    )
    return torch.where(mask[None, :, None].to(states.device), states, reference)


class AdaptiveSpread(BaseModel):
    """A perturbation whose in-mask spread is steered by the scores' deviation.

    Scores in a group should differ neither too little nor too much: candidates that all succeed or
    all fail teach nothing, and the spread that separates them differs by kind of edit. After each
    update the spread of every task type is multiplied by ``exp(rate)`` when the mean within-group
    deviation of the watched score lay below ``band`` and divided by it when it lay above. The state
    travels with the adapter. Ours; the papers fix the spread.

    Attributes:
        start: the law to begin with; its ``inside`` is what is steered.
        watch: reward term, or component of one (``judge.instruction``), whose within-group
            deviation is steered.
        band: target deviation (low, high), in the unit of the watched score.
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
        """Names the reward term of :attr:`watch`."""
        return self.watch.partition(".")[0]

    def at(self, state: Mapping[str, float], task_type: str) -> Perturbation:
        """Returns the law for one task: its type's spread so far, else the first one."""
        # A type of edit that no update has had yet starts as configured.
        return self.start.model_copy(update={"inside": state.get(task_type, self.start.inside)})

    def steered(
        self, state: Mapping[str, float], tables: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """Returns the spreads after an update, by task type.

        Args:
            state: the spreads of the update's groups.
            tables: (task type, reward table) of each group; groups in which the watched score is
                missing have no influence.

        Raises:
            InputError: when nothing was steered yet and the watched term, although it scored, gives
                no such component.
        """
        spreads, deviations = dict(state), self._deviations(tables)
        if not state and not deviations:
            self._require_watched_score([table for _, table in tables])
        for task_type, deviation in deviations.items():
            # log a' = log a + rate * {1 below the band, 0 within, -1 above}, within the bounds.
            direction = (deviation < self.band[0]) - (deviation > self.band[1])
            spread = state.get(task_type, self.start.inside) * math.exp(self.rate * direction)
            spreads[task_type] = min(max(spread, self.min_spread), self.max_spread)
        return spreads

    def _require_watched_score(self, tables: Sequence[RewardTable]) -> None:
        """Refuses a watched component that its term, although it scored, does not have.

        A term that failed in every group says nothing about its components yet.
        """
        scored = [
            table
            for table in tables
            if self.watched_term in table.names and table.complete(self.watched_term)
        ]
        if not scored:
            return
        components = {
            f"{self.watched_term}.{part}"
            for table in scored
            for part in table.columns(self.watched_term)
        }
        raise InputError(
            f"algorithm.initial_noise.watch {self.watch!r} is no score of reward "
            f"{self.watched_term!r}: nothing would be steered. It has "
            f"{', '.join([self.watched_term, *sorted(components)])}."
        )

    def measured(
        self, state: Mapping[str, float], tables: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """Returns the spread before it was steered and the mean deviation, by task type.

        With ``train.max_lag`` 1 the groups were rolled out under the spread of one update earlier.
        """
        deviations = self._deviations(tables)
        spreads = {
            f"exploration/{task_type}/inside": state.get(task_type, self.start.inside)
            for task_type in deviations
        }
        return {
            **spreads,
            **{f"exploration/{kind}/deviation": value for kind, value in deviations.items()},
        }

    def _deviations(self, tables: Sequence[tuple[str, RewardTable]]) -> dict[str, float]:
        """Averages the within-group deviation of the watched score by task type.

        Types of which no group has the score are left out.
        """
        deviations: dict[str, list[float]] = {}
        for task_type, table in tables:
            scores = _watched(table, self.watch)
            if scores is not None:
                # Population deviation, as advantages are standardised by.
                deviations.setdefault(task_type, []).append(float(scores.std(correction=0)))
        return {task_type: sum(values) / len(values) for task_type, values in deviations.items()}


def _watched(table: RewardTable, name: str) -> Float[Tensor, " group"] | None:
    """Reads a term's or component's scores; None unless every candidate has one."""
    term, _, part = name.partition(".")
    if term not in table.names:
        return None
    if not part:
        scores = table.values[:, table.names.index(term)].double()
    elif part in (columns := table.columns(term)):
        scores = torch.tensor(columns[part], dtype=torch.float64)
    else:
        return None
    # A deviation over some of the candidates would not be one of the group.
    return scores if bool(scores.isfinite().all()) else None


def _perturbation_by_default(value: Any) -> Any:
    # A kind in the mapping comes later and wins.
    return {"kind": "perturbation", **value} if isinstance(value, Mapping) else value


InitialNoise = Annotated[
    Perturbation | AdaptiveSpread,
    Field(discriminator="kind"),
    BeforeValidator(_perturbation_by_default),
]
"""Seam: the initial noises of a group."""
