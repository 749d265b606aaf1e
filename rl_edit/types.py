"""The records that travel through rl-edit, and the legend of their shapes.

One image's way from dataset row to weight update is a chain of these frozen records::

    EditTask -> RolloutGroup -> RewardTable -> Advantages -> ReplayPoint -> LossOutput
    -> AdapterWeights

Legend (used in every annotation of the package)

=========  =====================================================================================
group      G, candidates of one task; index 0 is the unperturbed reference where the method
           keeps one
step       K, trained rollout steps; ``step_plus_1`` is a grid with both ends
token      L, packed target-latent tokens (row-major over the token grid)
channel    C, channels of one packed token
reward     reward terms
region     R, pooling regions
batch      B, evaluated points
=========  =====================================================================================

``sigma`` is the noise level: 1 is pure noise, 0 is clean. The two formulas of the flow are
``x = (1 - sigma) * clean + sigma * noise`` and ``velocity = noise - clean``. Masks have one
polarity everywhere: True where the instruction may change pixels.

Frozen means that no later stage fills fields in: a stage that knows more is another record. This
file knows no editor, no Ray and no file format. Examples build on the ones above them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rl_edit.scores import Measures, PerCandidate, RegionScores, RegionTable

T = TypeVar("T")
Status = Literal["ok", "invalid", "timeout", "refused"]
"""The fate of one score; only "ok" has a value."""

SDE = Literal["flow", "dance", "cps"]
"""Law of a stochastic sampling step (``flow.moments``).

"flow": Flow-GRPO (arXiv 2505.05470), keeps the marginals of the flow. "dance": DanceGRPO (arXiv
2505.07818), constant noise and its score correction. "cps": coefficient-preserving sampling
(Flow-CPS, arXiv 2509.05952), keeps the mix of predicted clean sample and noise, not the marginals.
"""


@dataclass(frozen=True, kw_only=True)
class EditTask:
    """One row of data: what to edit, how, and where pixels may change.

    Attributes:
        task_id: unique within a dataset; seeds and work ids derive from it.
        task_type: the kind of edit ("add", "remove", ...), by which results are broken down; "edit"
            if unknown.
        source: the image to edit, RGB 0..255.
        instruction: what to do, in words.
        edit_mask: True where the instruction may change pixels. Neither empty nor full.

    Example:
        >>> left = torch.zeros(32, 32, dtype=torch.bool)
        >>> left[:, :16] = True
        >>> image = torch.full((32, 32, 3), 128, dtype=torch.uint8)
        >>> words = dict(task_type="add", instruction="add a red square on the left")
        >>> fields = dict(task_id="0041", **words, source=image, edit_mask=left)
        >>> task = EditTask(**fields)
    """

    task_id: str
    task_type: str
    source: UInt8[Tensor, "height width 3"]
    instruction: str
    edit_mask: Bool[Tensor, "height width"]


@dataclass(frozen=True, kw_only=True)
class PairedTask(EditTask):
    """A task whose correct result is known.

    Attributes:
        target: the correct result, same size as ``source``.
        caption: what the edited region should show (CompBench's ``caption``), for text-image
            scores; may be "".

    Example:
        >>> paired = PairedTask(**fields, target=255 - image, caption="a red square")
    """

    target: UInt8[Tensor, "height width 3"]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class RegionsTask(EditTask):
    """A task whose separate places are known one by one.

    Attributes:
        regions: a row per place, disjoint. Their union is ``edit_mask``.

    Example:
        >>> top = left & (torch.arange(32)[:, None] < 16)
        >>> regions = torch.stack([top, left & ~top])
        >>> parted = RegionsTask(**fields, regions=regions)
    """

    regions: Bool[Tensor, "region height width"]


@dataclass(frozen=True, kw_only=True)
class PairedRegionsTask(PairedTask, RegionsTask):
    """A paired task whose separate places are known.

    Example:
        >>> both = PairedRegionsTask(**fields, target=255 - image, regions=regions)
    """


def areas_of(task: EditTask) -> Bool[Tensor, "area height width"]:
    """Lists the separate places that may change: the task's regions, else its edit mask."""
    return task.regions if isinstance(task, RegionsTask) else task.edit_mask[None]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Encodings of one task, made and read by one editor.

    Attributes:
        source_latents: clean packed latents of the source image, on the same grid as the target.
            Objectives that pull towards the source read them.
        grid: (rows, columns) of the token grid; ``rows * columns == token``.
        tensors: everything else that the editor's velocity needs, under names of its own.

    Example:
        >>> conditioning = Conditioning(source_latents=torch.zeros(8, 4), grid=(2, 4))
    """

    source_latents: Float[Tensor, "token channel"]
    grid: tuple[int, int]
    # Only the editor knows these names: records and wire pass them on unread.
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class AdapterId:
    """Names an adapter version: its update and the hash of its bytes. Both must match.

    Example:
        >>> str(AdapterId(step=12, sha256="7ce9ad523b6b" + 52 * "0"))
        '12:7ce9ad523b6b'
    """

    # The order of fields is the order of versions: a later update is the greater id.
    step: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.step}:{self.sha256[:12]}"


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """LoRA tensors under their content name.

    Attributes:
        exploration: in-mask noise spread by task type, which the learner steers beside the weights
            for laws that adapt it. It travels with the weights, so that every actor that rolls out
            under them explores alike, after a resume too.

    Example:
        >>> adapter = AdapterId(step=12, sha256="7ce9ad523b6b")
        >>> lora = {"blocks.0.attn.to_q.lora_A": torch.zeros(4, 32)}
        >>> weights = AdapterWeights(id=adapter, tensors=lora, exploration={"add": 0.31})
    """

    id: AdapterId
    tensors: dict[str, Tensor]
    exploration: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """One group to roll out, or a chunk of its candidates.

    Content-addressed: the same item under the same weights gives the same bytes.

    Attributes:
        group_id: keyed hash of (run seed, update, slot, task id, epoch); no clock, no uuid, no
            actor.
        chunk: (first, past the last) candidate of the group that this item rolls out; the whole
            group is (0, G).
        task: the task itself.
        epoch: how many times this task has been used before in this run.
        update: the update this group is meant for; step-noise schedules read it.
        num_candidates: group size G.
        run_seed: root of every seed of the run.
        adapter: the weights the actor must use; it reports the hash of what it loaded and a
            mismatch is refused.
        explores: whether its steps are stochastic where the method's are. Where weights are
            compared, all are deterministic.

    Example:
        >>> numbers = dict(epoch=0, update=12, num_candidates=2, run_seed=1)
        >>> item = WorkItem(group_id="9f2c", chunk=(0, 2), task=task, adapter=adapter, **numbers)
        >>> item.work_id
        '9f2c.0-2'
    """

    group_id: str
    chunk: tuple[int, int]
    task: EditTask
    # (run seed, task id, epoch, candidate) addresses every draw (``exploration.NoiseSource``).
    epoch: int
    update: int
    num_candidates: int
    run_seed: int
    adapter: AdapterId
    explores: bool = True

    @property
    def work_id(self) -> str:
        """Names the item: its group and its chunk."""
        return f"{self.group_id}.{self.chunk[0]}-{self.chunk[1]}"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Finished edits of one task, and where the editor looked: all that a reward sees.

    Attributes:
        images: decoded results on the task's canvas.
        attention: text-to-image attention mass per candidate and token, mean over captured layers
            and all steps; rows sum to 1.
        token_mask: True for tokens of the edit region.

    Example:
        >>> token_mask = torch.tensor([True, True, False, False] * 2)
        >>> attended = dict(attention=torch.full((2, 8), 1 / 8), token_mask=token_mask)
        >>> candidates = Candidates(task=task, images=image.expand(2, 32, 32, 3), **attended)
    """

    task: EditTask
    images: UInt8[Tensor, "group height width 3"]
    attention: Float[Tensor, "group token"]
    token_mask: Bool[Tensor, " token"]


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The group: every candidate of one task with its trajectory. The unit on the wire.

    Only the trained steps are stored. Velocities are stored rather than log-probabilities: every
    objective derives what it needs from them, and the old policy is formed by the same train solver
    as the new one.

    Attributes:
        adapter: id computed from the tensors the actor really had loaded.
        latents: state at the start of each trained step.
        next_latents: state at the end of each trained step (the rollout solver's).
        velocities: velocity under the behaviour weights at ``latents``.
        sigmas, sigmas_next: noise level at the start and end of each trained step.
        step_noise: SDE level of each trained step; 0 is the ODE.
        sde: the law of the stochastic ones.
        schedule: the whole grid of noise levels, from (near) 1 to 0.
        areas: separate edit areas on the token grid, disjoint; their union is the token mask.
            Credit by region reads them.
        candidates: the finished edits, with the task, the token mask and the attention.

    Example:
        >>> x, grid = torch.ones(2, 1, 8, 4), torch.tensor([1.0, 0.7, 0.0])
        >>> states = dict(latents=x, next_latents=x, velocities=x)
        >>> step = dict(sigmas=grid[:1], sigmas_next=grid[1:2], step_noise=torch.tensor([0.9]))
        >>> made = dict(candidates=candidates, conditioning=conditioning, **states, **step)
        >>> course = dict(sde="flow", schedule=grid, areas=token_mask.reshape(1, 2, 4))
        >>> group = RolloutGroup(group_id="9f2c", adapter=adapter, **made, **course)
    """

    group_id: str
    adapter: AdapterId
    candidates: Candidates
    conditioning: Conditioning
    # States are float32 whatever dtype the editor computes in (``rollout.denoise``).
    latents: Float[Tensor, "group step token channel"]
    next_latents: Float[Tensor, "group step token channel"]
    velocities: Float[Tensor, "group step token channel"]
    # One level for the whole group: its candidates walk the grid side by side.
    sigmas: Float[Tensor, " step"]
    sigmas_next: Float[Tensor, " step"]
    step_noise: Float[Tensor, " step"]
    sde: SDE
    # DiffusionNFT noises to levels of the whole grid, not of the trained steps only.
    schedule: Float[Tensor, " grid"]
    areas: Bool[Tensor, "area rows columns"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A reward for one candidate, or the reason why there is none.

    A score that is not ok has no number: it is never 0.

    Attributes:
        value: in the unit and range its reward declares; None exactly when it is not ok.
        reason: why there is no value; "" when it is ok.
        components: named parts, for the log and the report.
        regions: the same by region; None from a term that does not score regions.
        status: "invalid" (no answer, or one that is no score), "timeout" (no answer in time) or
            "refused" (the judge declined to answer). "ok" exactly when there is a value. Without
            one it is "invalid" unless declared.

    Example:
        >>> Score(value=7.5, components={"instruction": 9.0, "artefacts": 6.25})
        >>> Score(value=None, reason="no answer within 60 s", status="timeout")
    """

    value: float | None
    reason: str = ""
    components: dict[str, float] = field(default_factory=dict)
    regions: RegionScores | None = None
    status: Status = "ok"

    def __post_init__(self) -> None:
        if self.value is None and self.status == "ok":
            # A frozen record sets its own default this way, before any reader has it.
            object.__setattr__(self, "status", "invalid")
        if self.value is not None and self.status != "ok":
            raise ValueError(
                f"a score that is {self.status} has no value, got {self.value!r}: "
                "a number here would be an invented one"
            )

    @property
    def ok(self) -> bool:
        """True when there is a value."""
        return self.value is not None


@dataclass(frozen=True, kw_only=True)
class RewardTable:
    """Every reward term of every candidate of one group: raw, unweighted, nothing dropped.

    Attributes:
        names, weights: one per reward term; weights are those of the run's config.
        values: higher is better (a term that is better when lower is negated). NaN exactly where
            ``valid`` is False.
        reasons: why terms are invalid, in words, without repeats.
        out_of_contract: whether a term returned a value that its declaration rules out.
        components: named parts of the scores by term, then by part.
        regions: scores by region of the terms that give them, by term.
        repeats: a second score minus the first, by term; NaN for candidates scored once.
        measures: what every run measures; None where only rewards were asked for.
        counts: scores by "term.status" (``counts["editscore.timeout"]``), and of terms with a cache
            those recalled ("term.cached") and those that could not be written ("term.uncached").
        notes: what the user should know about how the scores came about, without repeats.

    Example:
        >>> table = RewardTable(
        ...     group_id="9f2c",
        ...     names=("judge", "preservation"),
        ...     weights=(1.0, 0.5),
        ...     values=torch.tensor([[7.5, 0.91], [4.0, 0.97]]),
        ...     valid=torch.ones(2, 2, dtype=torch.bool),
        ...     components={"judge": {"instruction": (9.0, 4.5)}},
        ...     counts={"judge.ok": 2, "preservation.ok": 2},
        ... )
    """

    group_id: str
    names: tuple[str, ...]
    weights: tuple[float, ...]
    # NaN rather than 0: a forgotten check of ``valid`` shows itself as NaN in the loss.
    values: Float[Tensor, "group reward"]
    valid: Bool[Tensor, "group reward"]
    reasons: tuple[str, ...] = ()
    out_of_contract: bool = False
    components: dict[str, dict[str, PerCandidate]] = field(default_factory=dict)
    regions: dict[str, RegionTable] = field(default_factory=dict)
    repeats: dict[str, PerCandidate] = field(default_factory=dict)
    measures: Measures | None = None
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def complete(self, *others: str) -> bool:
        """Checks that every candidate has a score of every weighted term, and of ``others``.

        A term that is only measured may fail.
        """
        # A weight of 0 marks a term that is measured and does not steer.
        decides = [
            weight > 0 or name in others
            for name, weight in zip(self.names, self.weights, strict=True)
        ]
        return bool(self.valid[:, torch.tensor(decides)].all())

    def columns(self, term: str) -> dict[str, PerCandidate]:
        """Names everything a term gave besides its value: its components and its regions."""
        regions = self.regions[term].columns() if term in self.regions else {}
        return {**self.components.get(term, {}), **regions}


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """Credit of one group, by candidate and region.

    Attributes:
        values: advantage of each candidate in each region.
        regions: pooling weights over tokens; each row sums to 1. Whole-image credit is one row.
        weights: weight of each region in the objective; sums to 1.

    Example:
        >>> rows = dict(regions=torch.full((1, 8), 1 / 8), weights=torch.ones(1))
        >>> credit = Advantages(values=torch.tensor([[1.0], [-1.0]]), **rows)
    """

    # Columns of ``values``, rows of ``regions`` and ``weights`` are in one order of regions.
    values: Float[Tensor, "group region"]
    regions: Float[Tensor, "region token"]
    weights: Float[Tensor, " region"]


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A scalar loss with its graph, and detached scalars to log beside it.

    Example:
        >>> LossOutput(loss=torch.tensor(-0.02), metrics={"ratio/max": torch.tensor(1.001)})
    """

    loss: Float[Tensor, ""]  # the negated objective: smaller is better
    metrics: dict[str, Tensor]


def moved(record: T, device: torch.device | str) -> T:
    """Copies a record with every tensor on ``device``, through nested records."""
    # Numbers, strings and tuples pass unchanged: no record keeps a tensor in a tuple.
    if isinstance(record, Tensor):
        return record.to(device)  # type: ignore[return-value]  # a Tensor is what T is here
    if is_dataclass(record) and not isinstance(record, type):
        return replace(
            record, **{f.name: moved(getattr(record, f.name), device) for f in fields(record)}
        )
    if isinstance(record, dict):
        tensors = {name: moved(value, device) for name, value in record.items()}
        return tensors  # type: ignore[return-value]  # a dict of the same kind
    return record
