"""A run as one frozen value, read from YAML with dotted overrides. The validated object is what runs.

Defaults live here or in the seam they belong to, once. An unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rl_edit.data import DataConfig
from rl_edit.editors import EditorConfig
from rl_edit.editors.lora import LoraConfig
from rl_edit.errors import InputError
from rl_edit.evaluation import EvaluationConfig
from rl_edit.method.advantages import RegionCredit, SplitCredit
from rl_edit.method.algorithms import METHODS, Algorithm
from rl_edit.method.exploration import AdaptiveSpread
from rl_edit.method.rollout import Solver
from rl_edit.rewards import Reward

OPERATIONAL_TRAIN = frozenset(
    {"updates", "checkpoint_every", "keep_checkpoints", "max_dropped_groups", "max_skipped"}
    | {"max_failed_commits", "ratio_tolerance", "grace_s"}
)
OPERATIONAL_ROLLOUT = ("chunk",)
"""Settings that say how and where work is done, not what it results in; they may change on resume."""


class RolloutConfig(BaseModel):
    """How a group is sampled.

    Attributes:
        group_size: candidates per task (G). 12 in Neighbor GRPO; the reference candidate counts as one.
        num_steps: solver steps per trajectory (T). Neighbor GRPO rolls out 8.
        solver: "euler", or "dpm++": DPM-Solver++(2M), second order. Surrogates over deterministic rollouts form old and new anchors by
            the same one-step train solver either way (Neighbor GRPO's solver decoupling), so their ratio stays exactly 1.
        chunk: candidates per work item: a group's chunks run on any actors, are scored as they arrive, and only a lost chunk is
            run again. A multiple of editor.micro_batch, so that results do not depend on it. None is the whole group.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
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
        updates: updates of the whole run, each of ``inner_epochs * minibatches`` optimizer steps.
        groups_per_update: groups one update learns from.
        learning_rate, weight_decay: AdamW; 3e-4 and 1e-4 are the LoRA values of flow_grpo and CoCoEdit.
        max_grad_norm: 1.0 throughout the field.
        inner_epochs: optimizer steps per batch of groups; from the second on the ratio leaves 1 and the clip acts.
        minibatches: equal parts of the groups, each with an optimizer step of its own: from the second on the ratio leaves 1. 2 in
            Neighbor GRPO and Flow-GRPO, 4 in MixGRPO as released; 1 learns from all groups at once.
        states_per_forward: states (anchors or candidates, at some step) of one forward and backward: more of them use a GPU better, fewer save memory.
            The gradient is the same up to rounding. None is one trained step at a time. editor.micro_batch splits forwards further.
        ema_decay: decay of an exponential moving average of the weights, which is then what is evaluated and saved; the policy and
            the actors do without. 0.9 in flow_grpo; None saves the policy. It starts short: min((1 + n) / (10 + n), ema_decay).
        max_lag: 0 is strictly on-policy; 1 is one-step-off: groups of update u are rolled out with the weights of u - 1,
            while update u - 1 is learnt. Groups are assigned to versions by number, so timing never changes a result.
        ratio_tolerance: largest |ratio - 1| accepted on-policy; exactly 0 is reached in fp32 with equal micro-batches.
        reduction: how several learner ranks add their gradients. "ordered" adds group by group in slot order, so that the number
            of ranks never changes a bit; "allreduce" is one collective, equal up to rounding.
        max_dropped_groups: groups per update that may be dropped (invalid reward, retries spent) before the run stops.
        max_skipped: updates in a row skipped for a loss or gradient that is not finite, at which the run stops.
        checkpoint_every, keep_checkpoints: in updates; the last one is always kept.
        max_failed_commits: checkpoints in a row that fail (a full disk), at which the run stops.
        grace_s: longest time from a first SIGTERM or SIGINT to the end: the update being applied is finished within it, and committed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    updates: int = Field(default=50, ge=1)
    groups_per_update: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    inner_epochs: int = Field(default=1, ge=1)
    minibatches: int = Field(default=1, ge=1)
    states_per_forward: int | None = Field(default=None, ge=1)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    max_lag: int = Field(default=0, ge=0, le=1)
    ratio_tolerance: float = Field(default=1e-6, ge=0)
    reduction: Literal["ordered", "allreduce"] = "ordered"
    max_dropped_groups: int = Field(default=0, ge=0)
    max_skipped: int = Field(default=3, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    max_failed_commits: int = Field(default=3, ge=1)
    grace_s: float = Field(default=20, gt=0)


class ActorsConfig(BaseModel):
    """Where processes run, and how long they are trusted.

    Attributes:
        runtime: "ray" is the system; "thread" and "inline" run the same classes in this process, for debugging and tests.
        placement: "disaggregated" gives rollout and learner processes of their own; "colocated" has one process hold the base
            once for both, each rollout actor being a learner rank too. Results are the same.
        num_rollout, num_reward: actors of each kind.
        num_learner: learner ranks (torch.distributed); in the colocated placement it equals num_rollout.
        rollout_gpus, reward_gpus, learner_gpus: GPUs of each actor; fractions share one. 0 is CPU. Colocated processes take rollout_gpus.
        shard_base: shard the frozen base over the learner ranks (FSDP2) when it is too big for one GPU.
        threads: CPU threads of each actor; None splits the cores so that actors that are busy together never
            oversubscribe them.
        min_rollout, min_reward: the run goes on with fewer actors, down to these, when a seat is quarantined.
        deadline_s: longest wait for one call. Once calls of a kind have been timed it is the larger of 60 s and five times their
            usual duration, never more than this; scoring also has what a judge elsewhere may take by its own timeouts and retries.
            Past it the actor is killed, re-created, and the work run again.
        start_timeout_s: longest wait for all actors to be placed and to have loaded (or downloaded) their models.
        wait_for_nodes_s: how long an autoscaler may take to bring nodes that the cluster lacks; 0 refuses at once.
        infra_retries: repetitions of one work item after lost actors; data_retries: after errors raised by the work itself.
        backoff_s: pause before the second infra retry; it doubles up to 30 s.
        quarantine_after: kills of one seat within ten minutes after which it is given up.
        stall_s: silence after which the run says what is pending, on whom, and since when.
        dashboard: start Ray's dashboard for a local cluster, on loopback.
        preflight: before the first update, prove on the real actors that adapters are applied and that the ratio is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    runtime: Literal["ray", "thread", "inline"] = "ray"
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    num_rollout: int = Field(default=1, ge=1)
    num_reward: int = Field(default=1, ge=1)
    num_learner: int = Field(default=1, ge=1)
    rollout_gpus: float = Field(default=0, ge=0)
    reward_gpus: float = Field(default=0, ge=0)
    learner_gpus: float = Field(default=0, ge=0)
    shard_base: bool = False
    threads: int | None = Field(default=None, ge=1)
    min_rollout: int = Field(default=1, ge=1)
    min_reward: int = Field(default=1, ge=1)
    deadline_s: float = Field(default=600, gt=0)
    start_timeout_s: float = Field(default=1800, gt=0)
    wait_for_nodes_s: float = Field(default=0, ge=0)
    infra_retries: int = Field(default=5, ge=0)
    data_retries: int = Field(default=2, ge=0)
    backoff_s: float = Field(default=1, ge=0)
    quarantine_after: int = Field(default=3, ge=1)
    stall_s: float = Field(default=120, gt=0)
    dashboard: bool = False
    preflight: bool = True

    @model_validator(mode="after")
    def _possible(self) -> ActorsConfig:
        if self.placement == "colocated" and self.num_learner != self.num_rollout:
            raise ValueError(
                f"placement colocated makes every rollout actor a learner rank, got num_rollout {self.num_rollout} and num_learner "
                f"{self.num_learner}: set both to the same number."
            )
        if self.runtime != "ray" and self.num_learner > 1:
            raise ValueError(
                f"runtime {self.runtime!r} is one process, which cannot hold num_learner {self.num_learner} ranks: use runtime ray, or 1."
            )
        if self.shard_base and self.num_learner == 1:
            raise ValueError(
                "shard_base with one learner rank would shard over nobody: raise num_learner, or leave shard_base out."
            )
        if self.shard_base and self.placement == "colocated":
            raise ValueError(
                "shard_base needs placement disaggregated: in colocated processes every rollout would have to wait for all learner ranks."
            )
        for role, least, number in (
            ("rollout", self.min_rollout, self.num_rollout),
            ("reward", self.min_reward, self.num_reward),
        ):
            if least > number:
                raise ValueError(
                    f"min_{role} {least} exceeds num_{role} {number}: lower min_{role} or raise num_{role}."
                )
        return self


class RunConfig(BaseModel):
    """One run. ``rewards`` maps a name of yours to a reward term; the name appears in metrics and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str = "run"
    seed: int = 0
    editor: EditorConfig = EditorConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    algorithm: Algorithm = Algorithm()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, Reward]
    train: TrainConfig = TrainConfig()
    actors: ActorsConfig = ActorsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("algorithm", mode="before")
    @classmethod
    def _bundle(cls, value: Any) -> Any:
        """A known ``algorithm.name`` supplies every seam; the other keys adjust it."""
        if isinstance(value, Mapping) and not isinstance(value.get("name", ""), str):
            raise ValueError(
                f"name {value['name']!r} is no method's name: use one of {', '.join(METHODS)}, or custom"
            )
        if isinstance(value, Mapping) and value.get("name", "custom") in METHODS:
            return _merge(METHODS[value["name"]].algorithm.model_dump(mode="json"), value)
        if isinstance(value, Mapping) and value.get("name", "custom") != "custom":
            near = difflib.get_close_matches(str(value["name"]), [*METHODS, "custom"], n=1)
            raise ValueError(
                f"unknown method {value['name']!r}{f', did you mean {near[0]!r}?' if near else ''} (known: {', '.join(METHODS)}, custom)"
            )
        return value

    @field_validator("rewards", mode="before")
    @classmethod
    def _name_terms(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: {**term, "name": key} if isinstance(term, Mapping) else term
                for key, term in value.items()
                if term is not None
            }
        return value

    def patience_s(self) -> float:
        """Longest that scoring one piece of work waits for judges elsewhere that never answer, in seconds."""
        candidates = self.rollout.chunk or self.rollout.group_size
        return sum(term.patience_s(candidates) for term in self.rewards.values())

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        """Impossible combinations, before anything is loaded."""
        self.algorithm.check(
            group_size=self.rollout.group_size,
            num_steps=self.rollout.num_steps,
            multistep=self.rollout.solver != "euler",
            guided=self.editor.true_cfg > 1,
        )
        for name in self.algorithm.credit.needed_components():
            term = self.rewards.get(name)
            if term is None or not term.gives_regions or term.weight <= 0:
                able = [
                    other for other, candidate in self.rewards.items() if candidate.gives_regions
                ]
                raise ValueError(
                    f"algorithm.credit {self.algorithm.credit.kind!r} reads scores by region from reward {name!r}, "
                    f"{'which is not among rewards' if term is None else 'which gives none or has no weight'}: name one that does in "
                    f"algorithm.credit.term ({', '.join(able) or 'e.g. a reward of kind region_judge'})."
                )
        self._require_named()
        chunk, rows = self.rollout.chunk, self.editor.micro_batch
        if chunk is not None and chunk % rows:
            raise ValueError(
                f"rollout.chunk {chunk} is not a multiple of editor.micro_batch {rows}: a candidate's bits would depend on its chunk. "
                f"Use {max(rows, chunk // rows * rows)}."
            )
        if self.train.groups_per_update % self.train.minibatches:
            raise ValueError(
                f"train.groups_per_update {self.train.groups_per_update} does not divide into train.minibatches {self.train.minibatches} "
                "equal parts: change one of them."
            )
        if self.editor.dtype == "float16":
            raise ValueError(
                "editor.dtype float16 trains nothing: gradients of single latents lie below the smallest number it has, and become zero. "
                "Use bfloat16, or float32."
            )
        if self.train.groups_per_update < self.actors.num_learner:
            raise ValueError(
                f"actors.num_learner {self.actors.num_learner} exceeds train.groups_per_update {self.train.groups_per_update}: "
                "some ranks would have nothing to learn from. Lower num_learner or raise groups_per_update."
            )
        attention = [
            name for name, term in self.rewards.items() if term.needs_attention and term.weight > 0
        ]
        if attention and self.editor.attention_layers == 0:
            raise ValueError(
                f"reward {attention[0]!r} reads attention but editor.attention_layers is 0: set it to 1 or more, or the weight to 0."
            )
        if not any(term.weight > 0 for term in self.rewards.values()):
            raise ValueError(
                "no reward has a positive weight: nothing would be learnt. Raise a weight in rewards."
            )
        return self

    def _require_named(self) -> None:
        """Every reward that credit and exploration name is there."""
        credit, noise, known = (
            self.algorithm.credit,
            self.algorithm.initial_noise,
            ", ".join(self.rewards),
        )
        if isinstance(credit, SplitCredit | RegionCredit):
            heard = {name for name, term in self.rewards.items() if term.weight > 0}
            judged, keeps = heard - set(credit.needed_components()), set(credit.background_terms)
            unknown = ", ".join(sorted(keeps - set(self.rewards)))
            if judged and keeps and (judged.isdisjoint(keeps) or unknown):
                raise ValueError(
                    f"algorithm.credit.background_terms names {', '.join(sorted(keeps))}, and {unknown or 'none of it'} is no reward with "
                    f"a weight ({known}): name those that judge what should stay, or give [] if none does. All others judge the edit."
                )
            self._require_edit_judged(heard)
        if isinstance(noise, AdaptiveSpread) and noise.watched_term not in self.rewards:
            raise ValueError(
                f"algorithm.initial_noise.watch is {noise.watch!r}, and {noise.watched_term!r} is not among rewards ({known}): nothing "
                "would be steered. Name one of them, or a component of one as TERM.COMPONENT."
            )

    def _require_edit_judged(self, heard: Set[str]) -> None:
        """Credit split by area follows some reward inside the mask too."""
        credit = self.algorithm.credit
        if (
            isinstance(credit, SplitCredit)
            and credit.edit_share > 0
            and heard <= set(credit.background_terms)
        ):
            raise ValueError(
                f"algorithm.credit 'split' has no reward for the edit: {', '.join(sorted(heard))} judge what should stay "
                "(algorithm.credit.background_terms). Add a reward that judges the edit, such as editscore or region_judge, or set "
                "algorithm.credit.edit_share to 0."
            )

    def require_measured(self, left_out: Mapping[str, str]) -> None:
        """Refuses a run whose credit or exploration reads a reward that its data cannot feed.

        Args:
            left_out: why each reward that is left out is (``rewards.available``).

        Raises:
            InputError: with the name of the setting, the reward and the reason.
        """
        try:
            self._require_edit_judged(
                {
                    name
                    for name, term in self.rewards.items()
                    if term.weight > 0 and name not in left_out
                }
            )
        except ValueError as error:
            raise InputError(
                f"{error} Left out: {'; '.join(f'{name} ({why})' for name, why in left_out.items())}."
            ) from error
        noise = self.algorithm.initial_noise
        read = {
            **{
                name: f"algorithm.credit {self.algorithm.credit.kind!r}"
                for name in self.algorithm.credit.needed_components()
            },
            **(
                {noise.watched_term: "algorithm.initial_noise.watch"}
                if isinstance(noise, AdaptiveSpread)
                else {}
            ),
        }
        for name, reader in read.items():
            if name in left_out:
                raise InputError(
                    f"{reader} reads reward {name!r}, which is left out here ({left_out[name]}): nothing could be learnt from it. Give the "
                    "data what it lacks, or name a reward that it can feed, e.g. one of kind region_judge."
                )

    def sha256(self) -> str:
        """Hash of :meth:`identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The settings that change results: not names, places of processes, paths (their content is hashed) or budgets."""
        content: dict[str, Any] = self.model_dump(
            mode="json", exclude={"name", "actors", "evaluation"}
        )
        content["train"] = {k: v for k, v in content["train"].items() if k not in OPERATIONAL_TRAIN}
        content["rollout"] = {
            k: v for k, v in content["rollout"].items() if k not in OPERATIONAL_ROLLOUT
        }
        content["rewards"] = {
            n: {**term.fingerprint(), "weight": term.weight, "when": term.when}
            for n, term in self.rewards.items()
        }
        content["data"] = {
            k: v for k, v in content["data"].items() if k not in ("path", "heldout_path")
        }
        content["editor"] = {
            k: v for k, v in content["editor"].items() if k not in ("path", "revision", "device")
        }
        return content

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def is_default(name: str, value: Any) -> bool:
    """Whether a dotted setting of the schedule, the rollout or the adapter has its default: what a run made before it existed did."""
    section, _, key = name.partition(".")
    defaults = {"train": TrainConfig, "rollout": RolloutConfig, "lora": LoraConfig}
    known: dict[str, Any] = (
        defaults[section]().model_dump(mode="json") if section in defaults else {}
    )
    return key in known and known[key] == value


def presets() -> dict[str, str]:
    """Shipped presets by name, with their first comment line."""
    found = {}
    for entry in sorted(resources.files("rl_edit.presets").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text().splitlines()[0]
            found[entry.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def load_config(
    source: str | Path | None = None, *, preset: str | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The run of a preset or YAML file, with ``dotted.key=value`` overrides applied.

    Raises:
        InputError: one line that names the key, the value and the remedy.
    """
    if (source is None) == (preset is None):
        raise InputError("give either a YAML file or --preset NAME (see: rl-edit presets)")
    if preset is not None:
        known = presets()
        if preset not in known:
            near = difflib.get_close_matches(preset, known, n=1)
            raise InputError(
                f"unknown preset {preset!r}{f', did you mean {near[0]!r}?' if near else ''} Known: {', '.join(known)}."
            )
        text = (resources.files("rl_edit.presets") / f"{preset}.yaml").read_text()
        origin = f"preset {preset}"
    else:
        path = Path(str(source))
        if not path.is_file():
            raise InputError(
                f"no config file at {path}: give an existing YAML file or --preset NAME (see: rl-edit presets)"
            )
        try:
            text, origin = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read as UTF-8 text ({error}): give a YAML file"
            ) from error
    try:
        raw = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(
            f"{origin} must be a mapping of keys such as seed, editor, train; got {type(raw).__name__}"
        )
    raw = _of_method(raw, overrides)
    for override in overrides:
        raw = _override(raw, override)
    return validated(raw, origin)


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the second would silently take the place of the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.YAMLError(
                    f"{key.value!r} stands in line {seen[key.value]} and again in line {line}: keep one of them"
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


def validated(raw: Mapping[str, Any], origin: str) -> RunConfig:
    """The run of a raw mapping; every problem becomes one line."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(dict(item)) for item in error.errors(include_url=False)]
        more = (
            f" (and {len(problems) - 1} more: {'; '.join(problems[1:3])})"
            if len(problems) > 1
            else ""
        )
        raise InputError(f"{origin}: {problems[0]}{more}") from error


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, value = override.partition("=")
    if not separator or not key or key.startswith("-"):
        raise InputError(
            f"override {override!r} is not of the form dotted.key=value, e.g. train.updates=50"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML; quote it") from error
    result = copy.deepcopy(raw)
    node: Any = result
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = parsed
    return result


def _of_method(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``algorithm.name=OTHER`` asks for the other method as it is: what the file says about its own one does not adjust it."""
    named = [
        override.removeprefix("algorithm.name=").strip("\"' ")
        for override in overrides
        if override.startswith("algorithm.name=")
    ]
    algorithm = raw.get("algorithm")
    if (
        named
        and isinstance(algorithm, dict)
        and named[-1] in METHODS
        and named[-1] != algorithm.get("name")
    ):
        return {**raw, "algorithm": {"name": named[-1]}}
    return raw


def _merge(base: Any, change: Any) -> Any:
    """Nested mappings merged; a changed ``kind`` replaces its mapping whole."""
    if (
        isinstance(base, dict)
        and isinstance(change, Mapping)
        and change.get("kind", base.get("kind")) == base.get("kind")
    ):
        return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}
    return change


def _explain(error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    shown = _without_tags(location)
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1, cutoff=0.5)
        where = ".".join(shown[:-1])
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"known: {', '.join(sorted(_known_keys(location[:-1])))}"
        )
        return f"unknown key {'.'.join(shown)!r}: {hint}" + (f" (in {where})" if where else "")
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(context["tag"]), tags, n=1)
        key = ".".join([*shown, context["discriminator"].strip("'")])
        return f"{key}: unknown value {context['tag']!r}{f', did you mean {near[0]!r}?' if near else ''} (known: {', '.join(tags)})"
    if error["type"] == "union_tag_not_found":
        return f"{'.'.join(shown)} names no kind: add {'.'.join(shown)}.kind"
    message = error["msg"].removeprefix("Value error, ")
    if shown[:1] == [
        "rewards"
    ]:  # a key pasted into the wrong field must not reach a terminal or a log
        return f"{'.'.join(shown)}: {message}"
    plain = (
        value if isinstance(value, str | int | float | bool | type(None)) else type(value).__name__
    )
    return (
        f"{'.'.join(shown)}: {message}, got {plain!r}"
        if shown and error["type"] != "value_error"
        else ": ".join([*[".".join(shown)][: bool(shown)], message])
    )


def _without_tags(location: Sequence[str]) -> list[str]:
    """A location without the union tags pydantic inserts after a discriminated field."""
    current: Any = RunConfig
    shown = []
    for part in location:
        members = _models(current)
        if part in {_tag(m) for m in members if _tag(m)} and not any(
            part in m.model_fields for m in members
        ):
            current = next(m for m in members if _tag(m) == part)
            continue
        shown.append(part)
        current = _child(current, part)
    return shown


def _known_keys(location: Sequence[str]) -> list[str]:
    current: Any = RunConfig
    for part in location:
        tagged = [m for m in _models(current) if _tag(m) == part]
        current = tagged[0] if tagged else _child(current, part)
    return [key for model in _models(current) for key in model.model_fields]


def _child(annotation: Any, part: str) -> Any:
    for model in _models(annotation):
        if part in model.model_fields:
            return model.model_fields[part].annotation
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models an annotation admits, through unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, Annotated) or type(annotation).__name__ == "UnionType":
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return None if kind is None else str(kind.default)
