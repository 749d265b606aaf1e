"""Exploration: the law of a group's initial noises, the schedule of step noise, and where randomness comes from.

Every draw is keyed by (run seed, task id, draw, candidate) and made on the CPU in fp32, so a lost group is
recomputed bit for bit by any actor, whatever ran before on it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed from a keyed hash of the parts: order matters, neighbours share nothing."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class NoiseSource:
    """Standard normals of one group, addressed by purpose and candidate rather than drawn from a stream."""

    run_seed: int
    task_id: str
    draw: int

    def normal(self, purpose: str, candidate: int, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
        return torch.randn(shape, generator=self.generator(purpose, candidate), dtype=torch.float32)

    def generator(self, purpose: str, candidate: int = -1) -> torch.Generator:
        return torch.Generator().manual_seed(keyed_seed(self.run_seed, purpose, self.task_id, self.draw, candidate))


class InitialNoise(Protocol):
    """Seam: the initial noises of a group."""

    def __call__(
        self, num_candidates: int, shape: tuple[int, int], mask: Bool[Tensor, " token"], source: NoiseSource
    ) -> Float[Tensor, "group token channel"]: ...


class Perturbation(BaseModel):
    """Neighbours of one shared noise: ``e_i = sqrt(1 - a^2) * e + a * d_i``, element-wise of unit variance.

    ``a`` is ``inside`` on tokens of the edit region and ``outside`` elsewhere: the region-decoupled map of
    RC-GRPO-Editing (arXiv 2604.09386, Eq. 10-11). With ``inside == outside`` it is Neighbor GRPO's global neighbourhood
    (arXiv 2511.16955, Eq. 7); with both 1 the candidates are independent; with both 0 they are one.

    Attributes:
        inside: spread in the edit region. Neighbor GRPO found 0.3 best of {.1, .2, .3, .5, .7} for whole images; the
            region-decoupled law moves less of the picture, and benchmarks/results/ablation.md chose the presets' values.
        outside: spread elsewhere; small but positive in the paper ("numerical stability").
        keep_reference: candidate 0 is the unperturbed shared noise (RC-GRPO-Editing); it sits at half the squared
            distance of two perturbed candidates, so it is never an anchor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["perturbation"] = "perturbation"
    inside: float = Field(default=0.3, ge=0, le=1)
    outside: float = Field(default=0.02, ge=0, le=1)
    keep_reference: bool = True

    @property
    def num_references(self) -> int:
        """Leading candidates that are not perturbed and hence cannot be anchors."""
        return int(self.keep_reference)

    def __call__(
        self, num_candidates: int, shape: tuple[int, int], mask: Bool[Tensor, " token"], source: NoiseSource
    ) -> Float[Tensor, "group token channel"]:
        shared = source.normal("shared", -1, shape)
        spread = torch.where(mask, self.inside, self.outside)[:, None].float()
        keep = (1 - spread**2).sqrt()
        perturbed = [keep * shared + spread * source.normal("candidate", i, shape) for i in range(self.num_references, num_candidates)]
        return torch.stack([shared] * self.num_references + perturbed)


class NoStepNoise(BaseModel):
    """Deterministic rollouts: the probability-flow ODE at every step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["none"] = "none"

    def __call__(self, update: int, num_steps: int) -> Float[Tensor, " step"]:
        return torch.zeros(num_steps)


StepNoise = NoStepNoise
"""Seam: SDE level of each rollout step, ``(update, num_steps) -> [step]``. Deterministic rollouts are the only law so far."""
