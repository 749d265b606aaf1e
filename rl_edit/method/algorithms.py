"""Algorithms: bundles of values in five seams, and the published ones by name.

This is the only file where a paper's name selects behaviour. ``rl-edit methods`` prints the bundles
as a table; ``docs/method.md`` has their equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from rl_edit.method.advantages import CreditRule, GroupCredit, RegionCredit, SplitCredit
from rl_edit.method.exploration import InitialNoise, Perturbation
from rl_edit.method.objectives import (
    ForwardProcess,
    NeighborSurrogate,
    Objective,
    RegionRegularised,
    Setting,
    TransitionSurrogate,
)
from rl_edit.method.objectives.replay import Policy
from rl_edit.method.plugins import plugin_result
from rl_edit.method.regions import MaskedRows, UniformRows
from rl_edit.method.step_noise import ConstantNoise, NoiseWindow, NoStepNoise, StepNoise


class Latest(BaseModel):
    """Newest weights on the actors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["latest"] = "latest"

    def decay(self, update: int) -> float:
        """Returns the share of the old acting weights that remains after an update: none."""
        return 0.0


class Decayed(BaseModel):
    """Lagging average on the actors (DiffusionNFT's "old" policy, arXiv 2509.16117).

    After update n, counted from 1:
    ``acting <- decay(n) * acting + (1 - decay(n)) * policy``
    ``decay(n) = min(rate * max(n - start, 0), max_decay)``

    Published schedules are ``rate=0`` (copies every update), ``rate=0.001, max_decay=0.5`` (its
    default) and ``start=75, rate=0.0075, max_decay=0.999``. The release counts optimizer steps;
    here an update counts once.

    Attributes:
        rate: growth of the decay per update. 0.001 is DiffusionNFT's default; 0 copies every
            update.
        max_decay: bound of the decay. 0.5 is DiffusionNFT's default.
        start: updates before the decay begins to grow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["decayed"] = "decayed"
    rate: float = Field(default=0.001, ge=0)
    max_decay: float = Field(default=0.5, ge=0, lt=1)
    start: int = Field(default=0, ge=0)

    def decay(self, update: int) -> float:
        """Returns the share of the old acting weights that remains after an update."""
        # A small share at first: while training is young, samples should be nearly on-policy.
        return min(self.rate * max(update - self.start, 0), self.max_decay)


Acting = Annotated[Latest | Decayed, Field(discriminator="kind")]
"""Seam: which weights the actors run."""


class Algorithm(BaseModel):
    """Bundle of five values that make a method.

    They are the noise of the start and of the steps, credit, objective and acting weights. The
    validated value is the object that runs.

    Attributes:
        name: of a bundled method, or "custom".
        initial_noise: the law of a group's initial noises.
        step_noise: SDE level of each rollout step; zero is the ODE.
        credit: from reward tables to advantages.
        objective: from advantages and trajectories to a loss.
        acting: which weights the actors run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str = "custom"
    initial_noise: InitialNoise = Perturbation()
    step_noise: StepNoise = NoStepNoise()
    credit: CreditRule = GroupCredit()
    objective: Objective = NeighborSurrogate()
    acting: Acting = Latest()

    def check(
        self, *, group_size: int, num_steps: int, multistep: bool, guided: bool = False
    ) -> None:
        """Checks that the five values fit the rollout and each other.

        Raises:
            ValueError: with the remedy.
        """
        self._require_comparison(group_size)
        self.step_noise.check(num_steps)
        # The number of stochastic steps is the same in every update; their place may move.
        stochastic = int((self.step_noise(0, num_steps) > 0).sum())
        self._require_consistent_noise(stochastic, multistep)
        self._require_trainable(
            Setting(
                group_size=group_size,
                num_references=self.initial_noise.num_references,
                num_steps=num_steps,
                stochastic=stochastic,
                multistep=multistep,
                guided=guided,
            )
        )
        plugin_result(
            f"algorithm.credit {self.credit.kind!r}: its needed_components",
            self.credit.needed_components,
        )

    def _require_comparison(self, group_size: int) -> None:
        """Requires at least two candidates of a group."""
        # An advantage is relative to the group's mean, so that of a single candidate is 0.
        if group_size < 2:
            raise ValueError(
                f"algorithm.credit {self.credit.kind!r} compares candidates, and "
                f"rollout.group_size is {group_size}: with fewer than 2 "
                "every advantage is zero. Raise rollout.group_size."
            )

    def _require_consistent_noise(self, stochastic: int, multistep: bool) -> None:
        """Requires step noise, start noise and solver that fit each other."""
        if stochastic and multistep:
            raise ValueError(
                "algorithm.step_noise makes stochastic steps, which a multistep rollout solver "
                "does not have: use rollout.solver euler, "
                "or step_noise {kind: none}."
            )
        if stochastic and self.initial_noise.background_pull > 0:
            raise ValueError(
                f"algorithm.initial_noise.background_pull {self.initial_noise.background_pull:g} "
                "moves states after each step, and a moved state is no "
                "sample of the stochastic step whose density is trained: set background_pull to 0, "
                "or step_noise to {kind: none}."
            )
        # Same start and no noise on the way: every candidate would be the same image.
        if not self.initial_noise.spreads and not stochastic:
            raise ValueError(
                "algorithm.initial_noise has no spread (inside 0, outside 0) and no step is "
                "stochastic: all candidates would be one. "
                "Set inside above 0, e.g. 0.3, or give a step_noise."
            )

    def _require_trainable(self, setting: Setting) -> None:
        """Requires an objective that fits the setting and reads velocities that exist."""
        where = f"algorithm.objective {self.objective.kind!r}"
        # The objective may be a plugin, so any error of its code is one of the configuration.
        try:
            plugin_result("its check", lambda: self.objective.check(setting))
            policies = plugin_result("its policies", lambda: set(self.objective.policies))
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
        if unknown := policies - set(get_args(Policy)):
            raise ValueError(
                f"{where} reads the velocity of {', '.join(sorted(map(str, unknown)))}: there is "
                f"{' and '.join(get_args(Policy))}"
            )


@dataclass(frozen=True, kw_only=True)
class Method:
    """Published method as a bundle, with its source.

    Attributes:
        citation: title and identifier of the paper.
        note: sources of its values, and our readings of the paper.
        needs_mask: True for a method that without the edit region would be another one.
        needs_attention: True if one of its rewards reads the editor's attention.
    """

    algorithm: Algorithm
    citation: str
    note: str
    needs_mask: bool = False
    needs_attention: bool = False


# One noise for all candidates: step noise alone makes them differ.
_SHARED = Perturbation(inside=0.0, outside=0.0, keep_reference=False)
# A noise for each candidate, as an ordinary sampler draws them.
_INDEPENDENT = Perturbation(inside=1.0, outside=1.0, keep_reference=False)
# RC-GRPO-Editing Eq. 10-11. The spreads are not published.
_DECOUPLED = Perturbation(inside=0.3, outside=0.02, keep_reference=True)
# Raw terms over the deviation of all rewards of the update: flow_grpo's global deviation, without
# the 1e-4 that it adds.
_BATCH = GroupCredit(normalise="none", deviation="batch", rows=UniformRows(), advantage_clip=5.0)

METHODS = {
    "rc-grpo": Method(
        algorithm=Algorithm(
            name="rc-grpo",
            initial_noise=_DECOUPLED,
            # Terms as z-scores over the minibatch; one row by the region-normalised metric
            # (Eq. B.3).
            credit=GroupCredit(normalise="minibatch", rows=MaskedRows()),
            objective=NeighborSurrogate(num_anchors=4, clip=1e-4),
        ),
        citation="RC-GRPO-Editing, arXiv 2604.09386",
        note="Spreads, group size and bandwidths are not published; 0.3 inside and clip 1e-4 "
        "follow Neighbor GRPO.",
        needs_mask=True,
        needs_attention=True,
    ),
    "neighbor-grpo": Method(
        algorithm=Algorithm(
            name="neighbor-grpo",
            initial_noise=Perturbation(inside=0.3, outside=0.3, keep_reference=False),
            # Advantages over a quasi-norm with p = 0.8 instead of a deviation.
            credit=GroupCredit(normalise="group", rows=UniformRows(), quasi_norm=0.8),
            objective=NeighborSurrogate(num_anchors=4, clip=1e-4, temperature=1.0),
        ),
        citation="Neighbor GRPO, arXiv 2511.16955",
        note="Spread 0.3, quasi-norm p = 0.8, 4 anchors and clip 1e-4 as published; it trains "
        "every step but the last (objective.num_steps: 4 of 8 is published); distances are means, "
        "so that the clip can act, with temperature 1.",
    ),
    "flow-grpo": Method(
        algorithm=Algorithm(
            name="flow-grpo",
            initial_noise=_SHARED,
            step_noise=ConstantNoise(level=0.9),
            credit=_BATCH,
            # 1e-4 suits the exponential of a mean log-density, not of a sum.
            objective=TransitionSurrogate(clip=1e-4),
        ),
        citation="Flow-GRPO, arXiv 2505.05470",
        note="Level, clip, batch-wide deviation and all steps but the last as in its "
        "FLUX.1-Kontext configuration; no KL there.",
    ),
    "flow-grpo-fast": Method(
        algorithm=Algorithm(
            name="flow-grpo-fast",
            initial_noise=_SHARED,
            # Steps 0..2 of a rollout of 6 are its noisy half.
            step_noise=NoiseWindow(level=0.8, sde="cps", size=2, schedule="random", stop=3),
            credit=_BATCH,
            objective=TransitionSurrogate(clip=1e-5),
        ),
        # No paper of its own: a variant of the released code.
        citation="Flow-GRPO-Fast, arXiv 2505.05470 (released code)",
        note="A short random window in the noisy half, steps elsewhere deterministic; CPS 0.8 and "
        "clip 1e-5 as released for FLUX.",
    ),
    "mixgrpo": Method(
        algorithm=Algorithm(
            name="mixgrpo",
            initial_noise=_SHARED,
            # Sliding window: noisy steps are optimised first (MixGRPO's progressive strategy).
            step_noise=NoiseWindow(level=0.7, size=2, schedule="progressive", every=25),
            # Each term's advantage is standardised in its group, and their sum is not again.
            credit=GroupCredit(
                normalise="group", deviation="none", rows=UniformRows(), advantage_clip=5.0
            ),
            objective=TransitionSurrogate(clip=1e-4),
        ),
        citation="MixGRPO, arXiv 2507.21802",
        note="The released window is 4 of 25 steps; 2 suit the few steps of editors. Deviations "
        "are the population's.",
    ),
    "diffusion-nft": Method(
        algorithm=Algorithm(
            name="diffusion-nft",
            initial_noise=_INDEPENDENT,
            credit=_BATCH,
            # beta 1 for single rewards; 0.1 is the release's choice for several.
            objective=ForwardProcess(beta=1.0),
            # The implicit policies are mixed with the acting one, so it may lag.
            acting=Decayed(),
        ),
        citation="DiffusionNFT, arXiv 2509.16117",
        note="beta 1, cut 5, reference weight 1e-4, acting decay rate 0.001 up to 0.5.",
    ),
    "cocoedit": Method(
        algorithm=Algorithm(
            name="cocoedit",
            initial_noise=_INDEPENDENT,
            credit=_BATCH,
            # Around the forward process above, with both hinges.
            objective=RegionRegularised(),
            acting=Decayed(),
        ),
        citation="CoCoEdit, arXiv 2602.14068",
        note="Weights 0.02 and tolerances of its FLUX.1-Kontext configuration; the edit hinge's "
        "reversed sign is corrected.",
        needs_mask=True,
    ),
    "spatialflow-grpo": Method(
        algorithm=Algorithm(
            name="spatialflow-grpo",
            initial_noise=_SHARED,
            step_noise=ConstantNoise(level=0.9),
            credit=RegionCredit(advantage_clip=5.0),
            # A ratio for each region: the fewer tokens it has, the wider its clip.
            objective=TransitionSurrogate(clip=1e-4, clip_by_area=True),
        ),
        citation="SpatialFlow-GRPO, arXiv 2606.26872",
        note="Region rewards as published (Eq. 3); the granularity of ratio, clip and region "
        "weights is our reconstruction.",
        needs_mask=True,
    ),
    "edit-grpo": Method(
        algorithm=Algorithm(
            name="edit-grpo",
            initial_noise=_SHARED,
            step_noise=ConstantNoise(level=0.9),
            # A border softened over one token leaves no seam between the two areas.
            credit=SplitCredit(soft_border=1, advantage_clip=5.0),
            objective=TransitionSurrogate(clip=1e-4, clip_by_area=True),
        ),
        citation="Edit-GRPO, arXiv 2605.16951",
        note="Only the abstract is public: edit and keep signals standardised apart over a "
        "softened border are our instantiation.",
        needs_mask=True,
    ),
    "edit-grpo-neighbor": Method(
        algorithm=Algorithm(
            name="edit-grpo-neighbor",
            initial_noise=_DECOUPLED,
            credit=SplitCredit(soft_border=1),
            objective=NeighborSurrogate(num_anchors=4, clip=1e-4, temperature=1.0),
        ),
        citation="Edit-GRPO, arXiv 2605.16951",
        note="The same signals over the masked surrogate of deterministic rollouts: a softmax per "
        "area.",
        needs_mask=True,
    ),
}
"""Bundles by paper name.

``algorithm.name`` in a config picks one, and the other keys adjust it.
"""
