"""An algorithm is a bundle of values in four seams. This is the only file where a paper's name
selects behaviour.

=================  ================================  ================  ===============================================
method             initial noise                     step noise        credit -> objective
=================  ================================  ================  ===============================================
RC-GRPO-Editing    strong inside the mask, weak      none              one area-normalised row ->
NeighborSurrogate
                   outside, centre kept
Neighbor GRPO      one spread everywhere             none              one uniform row, quasi-norm
-> NeighborSurrogate Flow-GRPO          shared                            constant          one
uniform row -> TransitionSurrogate Flow-GRPO-Fast     shared                            random
window     one uniform row -> TransitionSurrogate MixGRPO            shared
sliding window    one uniform row, terms summed -> the same DiffusionNFT       independent
none              one uniform row -> ForwardProcess CoCoEdit           independent
none              one uniform row -> RegionRegularised(the same) SpatialFlow-GRPO   shared
constant          a row a region -> TransitionSurrogate Edit-GRPO          shared, or as
RC-GRPO-Editing     constant or none  edit row + keep row -> either surrogate =================
================================  ================  ===============================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from rl_edit.method.advantages import CreditRule, GroupCredit, RegionCredit, SplitCredit
from rl_edit.method.exploration import (
    ConstantNoise,
    InitialNoise,
    NoiseWindow,
    NoStepNoise,
    Perturbation,
    StepNoise,
)
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


class Latest(BaseModel):
    """Actors run the newest weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["latest"] = "latest"

    def decay(self, update: int) -> float:
        """Share of the acting weights that an update leaves as it is: nothing."""
        return 0.0


class Decayed(BaseModel):
    """Actors run a lagging average: after update n (from 0), ``acting <- decay(n) * acting + (1 -
    decay(n)) * policy`` with ``decay(n) = min(rate * max(n - start, 0), max_decay)``
    (DiffusionNFT's "old" policy, arXiv 2509.16117).

    Published schedules: copying every update (rate 0), ``rate=0.001, max_decay=0.5`` (its default),
        and
    ``start=75, rate=0.0075, max_decay=0.999``.

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
        """Share of the acting weights that an update leaves as it is."""
        return min(self.rate * max(update - self.start, 0), self.max_decay)


Acting = Annotated[Latest | Decayed, Field(discriminator="kind")]
"""Seam: which weights the actors run."""


class Algorithm(BaseModel):
    """Five values: noise of the start and of the steps, credit, objective, acting weights. The
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
        """Raises ValueError, with the remedy, for a rollout this algorithm does not fit."""
        if group_size < 2:
            raise ValueError(
                f"algorithm.credit {self.credit.kind!r} compares candidates, and "
                f"rollout.group_size is {group_size}: with fewer than 2 "
                "every advantage is zero. Raise rollout.group_size."
            )
        self.step_noise.check(num_steps)
        stochastic = int((self.step_noise(0, num_steps) > 0).sum())
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
        if not self.initial_noise.spreads and not stochastic:
            raise ValueError(
                "algorithm.initial_noise has no spread (inside 0, outside 0) and no step is "
                "stochastic: all candidates would be one. "
                "Set inside above 0, e.g. 0.3, or give a step_noise."
            )
        setting = Setting(
            group_size=group_size,
            num_references=self.initial_noise.num_references,
            num_steps=num_steps,
            stochastic=stochastic,
            multistep=multistep,
            guided=guided,
        )
        where = f"algorithm.objective {self.objective.kind!r}"
        try:
            plugin_result("its check", lambda: self.objective.check(setting))
            unknown = plugin_result("its policies", lambda: set(self.objective.policies)) - set(
                get_args(Policy)
            )
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
        if unknown:
            raise ValueError(
                f"{where} reads the velocity of {', '.join(sorted(map(str, unknown)))}: there is "
                f"{' and '.join(get_args(Policy))}"
            )
        plugin_result(
            f"algorithm.credit {self.credit.kind!r}: its needed_components",
            self.credit.needed_components,
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published method as a bundle.

    Attributes:
        citation: title and identifier of the paper.
        note: where its values come from, and what of it is our reading.
        needs_mask: whether the method is another one without the edit region.
        needs_attention: whether one of its rewards reads the editor's attention.
    """

    algorithm: Algorithm
    citation: str
    note: str
    needs_mask: bool = False
    needs_attention: bool = False


_SHARED = Perturbation(inside=0.0, outside=0.0, keep_reference=False)
_INDEPENDENT = Perturbation(inside=1.0, outside=1.0, keep_reference=False)
_DECOUPLED = Perturbation(inside=0.3, outside=0.02, keep_reference=True)
_BATCH = GroupCredit(normalise="none", deviation="batch", rows=UniformRows(), advantage_clip=5.0)

METHODS = {
    "rc-grpo": Method(
        algorithm=Algorithm(
            name="rc-grpo",
            initial_noise=_DECOUPLED,
            credit=GroupCredit(normalise="minibatch", rows=MaskedRows()),
            objective=NeighborSurrogate(num_anchors=4, clip=1e-4),
        ),
        citation="RC-GRPO-Editing, arXiv 2604.09386",
        note="Spreads, group size and bandwidths are not published; 0.3 inside and clip 1e-4 follow Neighbor GRPO.",
        needs_mask=True,
        needs_attention=True,
    ),
    "neighbor-grpo": Method(
        algorithm=Algorithm(
            name="neighbor-grpo",
            initial_noise=Perturbation(inside=0.3, outside=0.3, keep_reference=False),
            credit=GroupCredit(normalise="group", rows=UniformRows(), quasi_norm=0.8),
            objective=NeighborSurrogate(num_anchors=4, clip=1e-4, temperature=1.0),
        ),
        citation="Neighbor GRPO, arXiv 2511.16955",
        note="Spread 0.3, quasi-norm p = 0.8, 4 anchors and clip 1e-4 as published; it trains every step but the last "
        "(objective.num_steps: 4 of 8 is published); distances are means, so that the clip can "
        "act, with temperature 1.",
    ),
    "flow-grpo": Method(
        algorithm=Algorithm(
            name="flow-grpo",
            initial_noise=_SHARED,
            step_noise=ConstantNoise(level=0.9),
            credit=_BATCH,
            objective=TransitionSurrogate(clip=1e-4),
        ),
        citation="Flow-GRPO, arXiv 2505.05470",
        note="Level, clip, batch-wide deviation and all steps but the last as in its FLUX.1-Kontext configuration; no KL there.",
    ),
    "flow-grpo-fast": Method(
        algorithm=Algorithm(
            name="flow-grpo-fast",
            initial_noise=_SHARED,
            step_noise=NoiseWindow(level=0.8, sde="cps", size=2, schedule="random", stop=3),
            credit=_BATCH,
            objective=TransitionSurrogate(clip=1e-5),
        ),
        citation="Flow-GRPO-Fast, arXiv 2505.05470 (released code)",
        note="A short random window in the noisy half, steps elsewhere deterministic; CPS 0.8 and clip 1e-5 as released for FLUX.",
    ),
    "mixgrpo": Method(
        algorithm=Algorithm(
            name="mixgrpo",
            initial_noise=_SHARED,
            step_noise=NoiseWindow(level=0.7, size=2, schedule="progressive", every=25),
            credit=GroupCredit(
                normalise="group", deviation="none", rows=UniformRows(), advantage_clip=5.0
            ),
            objective=TransitionSurrogate(clip=1e-4),
        ),
        citation="MixGRPO, arXiv 2507.21802",
        note="The released window is 4 of 25 steps; 2 suit the few steps of editors. Deviations are the population's.",
    ),
    "diffusion-nft": Method(
        algorithm=Algorithm(
            name="diffusion-nft",
            initial_noise=_INDEPENDENT,
            credit=_BATCH,
            objective=ForwardProcess(beta=1.0),
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
            objective=RegionRegularised(),
            acting=Decayed(),
        ),
        citation="CoCoEdit, arXiv 2602.14068",
        note="Weights 0.02 and tolerances of its FLUX.1-Kontext configuration; the edit hinge's reversed sign is corrected.",
        needs_mask=True,
    ),
    "spatialflow-grpo": Method(
        algorithm=Algorithm(
            name="spatialflow-grpo",
            initial_noise=_SHARED,
            step_noise=ConstantNoise(level=0.9),
            credit=RegionCredit(advantage_clip=5.0),
            objective=TransitionSurrogate(clip=1e-4, clip_by_area=True),
        ),
        citation="SpatialFlow-GRPO, arXiv 2606.26872",
        note="Region rewards as published (Eq. 3); the granularity of ratio, clip and region weights is our reconstruction.",
        needs_mask=True,
    ),
    "edit-grpo": Method(
        algorithm=Algorithm(
            name="edit-grpo",
            initial_noise=_SHARED,
            step_noise=ConstantNoise(level=0.9),
            credit=SplitCredit(soft_border=1, advantage_clip=5.0),
            objective=TransitionSurrogate(clip=1e-4, clip_by_area=True),
        ),
        citation="Edit-GRPO, arXiv 2605.16951",
        note="Only the abstract is public: edit and keep signals standardised apart over a softened border are our instantiation.",
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
        note="The same signals over the masked surrogate of deterministic rollouts: a softmax per area.",
        needs_mask=True,
    ),
}
"""Vetted bundles by paper name; ``algorithm.name`` in a config picks one and the other keys adjust
it."""
