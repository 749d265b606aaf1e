"""The sections of a run's configuration that belong to no seam.

Each default lives here, once. A default taken from a paper names it beside the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rl_edit.method.rollout import Solver

OPERATIONAL_TRAIN = frozenset(
    {"updates", "checkpoint_every", "keep_checkpoints", "max_dropped_groups", "max_skipped"}
    | {"max_failed_commits", "ratio_tolerance", "grace_s"}
    | {"warn_silent", "max_silent", "allow_unrewarded_edit"}
)
OPERATIONAL_ROLLOUT = frozenset({"chunk"})
"""Settings of the place and manner of work. They change no result, so they may change on resume."""


class RolloutConfig(BaseModel):
    """Sampling of a group.

    Attributes:
        group_size: candidates per task (G). Neighbor GRPO uses 12. The reference candidate counts.
        num_steps: solver steps per trajectory (T). Neighbor GRPO rolls out 8.
        solver: "euler", or "dpm++" for DPM-Solver++(2M), which is of second order. Surrogates over
            deterministic rollouts form old and new anchors by one and the same one-step train
            solver (Neighbor GRPO's solver decoupling), so their ratio stays exactly 1 either way.
        chunk: candidates per work item. A group's chunks run on any actors and are scored as they
            arrive; only a lost chunk is run again. Must be a multiple of editor.micro_batch, so
            that results do not depend on it. None is the complete group.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    # 12 candidates and 8 steps in Neighbor GRPO.
    group_size: int = Field(default=8, ge=1)
    num_steps: int = Field(default=6, ge=2)
    solver: Solver = "euler"
    chunk: int | None = Field(default=None, ge=1)

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(first, past the last) candidate of each chunk of a group."""
        size = self.chunk or self.group_size
        return tuple(
            (start, min(start + size, self.group_size)) for start in range(0, self.group_size, size)
        )


class TrainConfig(BaseModel):
    """The learning schedule.

    Attributes:
        updates: updates of the run, each of ``inner_epochs * minibatches`` optimizer steps.
        groups_per_update: groups that one update learns from.
        learning_rate: of AdamW. 3e-4 is the LoRA value of flow_grpo and CoCoEdit.
        weight_decay: of AdamW. 1e-4 is the LoRA value of flow_grpo and CoCoEdit.
        max_grad_norm: norm to which gradients are clipped. 1.0 throughout the field.
        inner_epochs: passes over one batch of groups. From the second on the ratio leaves 1 and
            the clip acts.
        minibatches: equal parts of the groups, each with an optimizer step. From the second on the
            ratio leaves 1. Neighbor GRPO and Flow-GRPO use 2, MixGRPO as released 4. 1 learns from
            all groups at once.
        states_per_forward: states (anchors or candidates at some step) of one forward and backward.
            More use a GPU better, fewer save memory. The gradient is the same up to rounding. None
            is one trained step at a time. editor.micro_batch splits forwards further.
        ema_decay: decay of an exponential moving average of the weights. The average is then
            evaluated and saved; the policy and the actors do not use it. It warms up as
            min((1 + n) / (10 + n), ema_decay). flow_grpo uses 0.9. None saves the policy.
        max_lag: 0 is strictly on-policy. 1 is one-step-off: groups of update u are rolled out with
            the weights of u - 1, while update u - 1 is learnt. Groups are assigned to versions by
            number, so timing never changes a result.
        ratio_tolerance: largest deviation of the ratio from 1 accepted on-policy. fp32 with equal
            micro-batches reaches exactly 0.
        reduction: sum of gradients over learner ranks. "ordered" adds group by group in slot order,
            so the number of ranks never changes a bit. "allreduce" is one collective, equal up to
            rounding.
        max_dropped_groups: groups per update that may be dropped (invalid reward, retries spent)
            before the run stops.
        max_skipped: updates in a row skipped for a loss or gradient that is not finite, at which
            the run stops.
        warn_silent: updates in a row in which a reward with a weight gives all candidates of every
            group the same score, at which the run warns. Some groups tie by chance or because all
            edits are right; with 8 groups an update, 3 updates are 24 groups without a difference.
        max_silent: the same, at which the run stops; also at its end, when the reward never varied
            in it. A reward that varied before and now gives everything its best score is learnt,
            and only warned of. None never stops.
        allow_unrewarded_edit: train although the weighted sum of the rewards does not prefer the
            edit to the untouched source, to another task's edit or to a blank image. The report
            then says so first.
        checkpoint_every: updates between two checkpoints. The last update always has one.
        keep_checkpoints: checkpoints that stay on disk, the newest.
        max_failed_commits: checkpoints in a row that fail (a full disk), at which the run stops.
        grace_s: longest time from the first SIGTERM or SIGINT to the end, in seconds. The update
            being applied is finished and committed within it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    updates: int = Field(default=50, ge=1)
    groups_per_update: int = Field(default=8, ge=1)
    # AdamW, with the LoRA values of flow_grpo and CoCoEdit.
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    # On-policy by default: one optimizer step per batch keeps the ratio at 1.
    inner_epochs: int = Field(default=1, ge=1)
    minibatches: int = Field(default=1, ge=1)
    states_per_forward: int | None = Field(default=None, ge=1)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    max_lag: int = Field(default=0, ge=0, le=1)
    # bf16 and unequal batches deviate by rounding; more than this is another policy.
    ratio_tolerance: float = Field(default=1e-6, ge=0)
    reduction: Literal["ordered", "allreduce"] = "ordered"
    # From here on: safety, not learning. Each limit ends the run rather than let it go wrong.
    max_dropped_groups: int = Field(default=0, ge=0)
    max_skipped: int = Field(default=3, ge=1)
    warn_silent: int = Field(default=3, ge=1)
    max_silent: int | None = Field(default=10, ge=1)
    allow_unrewarded_edit: bool = False
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    max_failed_commits: int = Field(default=3, ge=1)
    grace_s: float = Field(default=20, gt=0)


def automatic_ranks(actors: Mapping[str, Any], train: TrainConfig) -> int:
    """Returns the learner ranks that ``num_learner: auto`` stands for.

    On a CPU, two ranks of one thread learn an update in about half the time of one rank of two
    threads, and the same bytes: with ordered reduction the number of ranks changes none.

    Args:
        actors: the section as it is read, before validation.
    """
    num_rollout = actors.get("num_rollout", 1)
    if not isinstance(num_rollout, int):
        return 1  # refused with its own message
    if actors.get("placement") == "colocated":
        return num_rollout
    one_process = actors.get("runtime", "ray") != "ray"
    # One update off, rollouts and learner share the cores at all times: more ranks gain nothing.
    shares_cores = train.max_lag > 0
    if one_process or shares_cores or actors.get("learner_gpus") or train.reduction != "ordered":
        return 1
    return min(num_rollout, train.groups_per_update)


class ActorsConfig(BaseModel):
    """Processes: their places, their number and their time limits.

    Attributes:
        runtime: "ray" is the system. "thread" and "inline" run the same classes in this process,
            for debugging and tests.
        placement: "disaggregated" gives rollout and learner separate processes. "colocated" lets
            one process hold the base once for both: each rollout actor is a learner rank too.
            Results are the same.
        num_rollout: rollout actors.
        num_reward: reward actors.
        num_learner: learner ranks (torch.distributed). Equal to num_rollout when colocated.
            "auto" is a rank for each rollout actor where ranks are processes on CPU cores and take
            turns with the rollouts, and 1 elsewhere.
        rollout_gpus: GPUs of each rollout actor. Fractions share one, each within its share of the
            memory; 0 is CPU. Colocated processes take this number.
        reward_gpus: GPUs of each reward actor.
        learner_gpus: GPUs of each learner rank.
        shard_base: shard the frozen base over the learner ranks (FSDP2), when it is too big for
            one GPU.
        threads: CPU threads of each actor. None splits the cores, so that actors that are busy
            together never oversubscribe them.
        min_rollout: rollout actors with which the run still goes on, when worker slots are
            quarantined.
        min_reward: the same for reward actors.
        min_learner: the same for learner ranks, which are given up when they cannot be started
            again. Results are the same. None is 1, and num_learner with shard_base.
        deadline_s: longest wait for one call, in seconds. Once calls of a kind have been timed, the
            wait is the larger of 60 s and five times their usual duration, never more than this.
            Scoring also has what a remote judge may take by its timeouts and retries. Past it the
            actor is killed, re-created, and the work run again.
        start_timeout_s: longest wait, in seconds, until all actors are placed and have loaded (or
            downloaded) their models.
        wait_for_nodes_s: seconds an autoscaler may take to bring nodes that the cluster lacks.
            0 refuses at once.
        infra_retries: repetitions of one work item after lost actors.
        data_retries: repetitions of one work item after errors raised by the work itself.
        backoff_s: pause before the second infra retry, in seconds. It doubles up to 30 s.
        quarantine_after: kills of one worker slot within ten minutes, after which it is given up.
        stall_s: seconds of silence after which the run reports what is pending, on which worker,
            and since when.
        max_stalls: such reports in a row, with nothing finished between them, after which the run
            saves what it has and ends with exit code 3. It never ends before twice deadline_s has
            passed, nor while actors start, which has start_timeout_s. By default half an hour:
            three calls that each miss a deadline of ten minutes.
        dashboard: start Ray's dashboard for a local cluster, on loopback.
        preflight: before the first update, prove on the real actors that adapters are applied and
            that the ratio is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    runtime: Literal["ray", "thread", "inline"] = "ray"
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    # Processes of each role.
    num_rollout: int = Field(default=1, ge=1)
    num_reward: int = Field(default=1, ge=1)
    num_learner: int = Field(default=1, ge=1)
    # Resources of each process.
    rollout_gpus: float = Field(default=0, ge=0)
    reward_gpus: float = Field(default=0, ge=0)
    learner_gpus: float = Field(default=0, ge=0)
    shard_base: bool = False
    threads: int | None = Field(default=None, ge=1)
    # Failures: how far the run may shrink, how long it waits, how often it tries again.
    min_rollout: int = Field(default=1, ge=1)
    min_reward: int = Field(default=1, ge=1)
    min_learner: int | None = Field(default=None, ge=1)
    deadline_s: float = Field(default=600, gt=0)
    start_timeout_s: float = Field(default=1800, gt=0)
    wait_for_nodes_s: float = Field(default=0, ge=0)
    infra_retries: int = Field(default=5, ge=0)
    data_retries: int = Field(default=2, ge=0)
    backoff_s: float = Field(default=1, ge=0)
    quarantine_after: int = Field(default=3, ge=1)
    stall_s: float = Field(default=120, gt=0)
    max_stalls: int = Field(default=15, ge=1)
    dashboard: bool = False
    preflight: bool = True

    @model_validator(mode="after")
    def _possible(self) -> ActorsConfig:
        if self.placement == "colocated" and self.num_learner != self.num_rollout:
            raise ValueError(
                "placement colocated makes every rollout actor a learner rank, got num_rollout "
                f"{self.num_rollout} and num_learner {self.num_learner}: set both to the same "
                "number."
            )
        # torch.distributed gives each rank a process; threads of one process share its group.
        if self.runtime != "ray" and self.num_learner > 1:
            raise ValueError(
                f"runtime {self.runtime!r} is one process, which cannot hold num_learner "
                f"{self.num_learner} ranks: use runtime ray, or 1."
            )
        for role in ("rollout", "reward", "learner"):
            gpus = getattr(self, f"{role}_gpus")
            if gpus > 1 and gpus != int(gpus):
                raise ValueError(
                    f"{role}_gpus {gpus:g} is neither a fraction of one GPU nor a whole number, "
                    "and Ray reserves nothing else: use a whole number, or less than 1."
                )
        if self.shard_base and self.num_learner == 1:
            raise ValueError(
                "shard_base with one learner rank has no rank to shard over: raise num_learner, "
                "or leave shard_base out."
            )
        if self.shard_base and self.placement == "colocated":
            raise ValueError(
                "shard_base needs placement disaggregated: in colocated processes every rollout "
                "would have to wait for all learner ranks."
            )
        if self.shard_base and self.fewest_ranks < self.num_learner:
            raise ValueError(
                f"min_learner {self.min_learner} is fewer than num_learner {self.num_learner}, and "
                "with shard_base the base fits only that many ranks: leave min_learner or "
                "shard_base out."
            )
        for role, minimum, number in (
            ("rollout", self.min_rollout, self.num_rollout),
            ("reward", self.min_reward, self.num_reward),
            ("learner", self.fewest_ranks, self.num_learner),
        ):
            if minimum > number:
                raise ValueError(
                    f"min_{role} {minimum} exceeds num_{role} {number}: lower min_{role} or raise "
                    f"num_{role}."
                )
        return self

    @property
    def fewest_ranks(self) -> int:
        """Learner ranks with which the run still goes on."""
        # A sharded base was made to fit this many ranks; on fewer it may not.
        return self.min_learner or (self.num_learner if self.shard_base else 1)


class EvaluationConfig(BaseModel):
    """Comparison of base and adapter, and held-out evaluation during training.

    Base and adapter see the same held-out tasks and the same noises.

    Attributes:
        num_tasks: held-out tasks. Fewer if the data has fewer.
        num_noises: noises per task. Intervals cluster by task.
        num_steps: solver steps. None takes the rollout's.
        seed: root of the evaluation noises, apart from training's.
        examples: tasks whose images are written, spread over task types.
        batch_size: rows evaluated together. A multiple of editor.micro_batch wastes none.
        every: updates between two held-out evaluations during training; 0 is never. One costs a
            candidate per task and changes nothing that is learnt.
        gold: the reward term that is trusted there. None is the first judge, or the first term
            where there is none. Best one that is not trained on (weight 0).
        probe_tasks: the first so many held-out tasks are evaluated, fewer if the data has fewer.
        patience: held-out evaluations in a row, each with more training reward and less gold than
            the one before, at which the alarm is raised.
        stop_on_alarm: end the run there. The best adapter by gold is stored either way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    num_tasks: int = Field(default=256, ge=1)
    num_noises: int = Field(default=1, ge=1)
    num_steps: int | None = Field(default=None, ge=2)
    # Far from the small seeds that runs use, so that no training noise is evaluated on.
    seed: int = 1_000_003
    examples: int = Field(default=12, ge=0)
    batch_size: int = Field(default=16, ge=1)
    # Held-out evaluation during training.
    every: int = Field(default=0, ge=0)
    gold: str | None = None
    probe_tasks: int = Field(default=32, ge=1)
    patience: int = Field(default=3, ge=1)
    stop_on_alarm: bool = False
