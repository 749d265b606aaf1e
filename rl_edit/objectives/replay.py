"""The record between an objective and the learner: states to evaluate again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReplayPoint:
    """States whose velocity under the current weights the loss needs.

    Attributes:
        latents, sigma: where to evaluate; no gradient flows into them.
        context: private to the objective that made the point.
    """

    latents: Float[Tensor, "batch token channel"]
    sigma: Float[Tensor, " batch"]
    context: Any
