"""One run as a frozen value: the sections, and the checks between them.

The validated object is what runs. Combinations that cannot work are refused here, before a model is
loaded or a process is started.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Set
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rl_edit.config.sections import (
    OPERATIONAL_ROLLOUT,
    OPERATIONAL_TRAIN,
    ActorsConfig,
    EvaluationConfig,
    RolloutConfig,
    TrainConfig,
    automatic_ranks,
)
from rl_edit.data.config import DataConfig
from rl_edit.editors import EditorConfig, editor_config
from rl_edit.editors.lora import LoraConfig
from rl_edit.errors import InputError
from rl_edit.method.advantages import RegionCredit, SplitCredit
from rl_edit.method.algorithms import METHODS, Algorithm
from rl_edit.method.exploration import AdaptiveSpread
from rl_edit.rewards import Reward


class RunConfig(BaseModel):
    """One run.

    Attributes:
        name: of the run. The run directory is runs/NAME unless one is given.
        seed: root of all random numbers of training.
        editor: the base model and its numerics.
        lora: the adapter that is trained.
        data: the tasks.
        algorithm: the method. A known ``name`` supplies every part; other keys adjust it.
        rollout: sampling of a group.
        rewards: reward terms under names that you choose. The names appear in metrics and reports.
        train: the learning schedule.
        actors: processes, their places and time limits.
        evaluation: comparison of base and adapter, and held-out evaluation during training.
    """

    # A reward may declare an open range: infinity stays a number in YAML.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )
    name: str = "run"
    seed: int = 0
    editor: EditorConfig = editor_config({})
    lora: LoraConfig = Field(default=LoraConfig(), validate_default=True)
    data: DataConfig = DataConfig()
    algorithm: Algorithm = Algorithm()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, Reward]  # no default: a run has to say what it rewards
    train: TrainConfig = TrainConfig()
    actors: ActorsConfig = ActorsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("lora")
    @classmethod
    def _family_targets(cls, value: LoraConfig, info: ValidationInfo) -> LoraConfig:
        """Fills in the layers of the editor's family, so that a run records them."""
        # The editor is validated before; it is absent when it was refused, and a family of yours
        # need not name layers.
        targets = getattr(info.data.get("editor"), "lora_targets", value.targets)
        named = "targets" in value.model_fields_set or targets == value.targets
        return value if named else value.model_copy(update={"targets": targets})

    @field_validator("algorithm", mode="before")
    @classmethod
    def _bundle(cls, value: Any) -> Any:
        """Lets a known ``algorithm.name`` supply every seam. The other keys adjust it."""
        if not isinstance(value, Mapping):
            return value
        name = value.get("name", "custom")
        if not isinstance(name, str):
            raise ValueError(
                f"name {name!r} is no method's name: use one of {', '.join(METHODS)}, or custom"
            )
        # As JSON, so that a change of one key meets plain mappings and not validated objects.
        if name in METHODS:
            return _merge(METHODS[name].algorithm.model_dump(mode="json"), value)
        if name != "custom":
            near = difflib.get_close_matches(name, [*METHODS, "custom"], n=1)
            raise ValueError(
                f"unknown method {name!r}{f', did you mean {near[0]!r}?' if near else ''} "
                f"(known: {', '.join(METHODS)}, custom)"
            )
        return value

    @field_validator("rewards", mode="before")
    @classmethod
    def _name_terms(cls, value: Any) -> Any:
        """Gives every term its key as its name. A term set to null is removed."""
        # Null removes a term, so that an override can take one from a preset.
        if isinstance(value, Mapping):
            return {
                key: {**term, "name": key} if isinstance(term, Mapping) else term
                for key, term in value.items()
                if term is not None
            }
        return value

    @field_validator("actors", mode="before")
    @classmethod
    def _count_ranks(cls, value: Any, info: ValidationInfo) -> Any:
        """Replaces ``num_learner: auto`` by a number, which the run then records."""
        if not isinstance(value, Mapping) or value.get("num_learner") != "auto":
            return value
        # The schedule is validated before the actors; it is absent when it was refused.
        train = info.data.get("train", TrainConfig())
        return {**value, "num_learner": automatic_ranks(value, train)}

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        """Refuses impossible combinations, before anything is loaded."""
        self.algorithm.check(
            group_size=self.rollout.group_size,
            num_steps=self.rollout.num_steps,
            multistep=self.rollout.solver != "euler",
            guided=self.editor.guided,
        )
        # Each check names the setting to change. The first that fails is reported.
        self._require_regional_scores()
        self._require_background_terms()
        self._require_edit_scored(self._weighted_terms())
        self._require_steering_term()
        self._require_even_batches()
        self._require_number_format()
        self._require_attention()
        if not self._weighted_terms():
            raise ValueError(
                "no reward has a positive weight: nothing would be learnt. Raise a weight in "
                "rewards."
            )
        return self

    def _weighted_terms(self) -> set[str]:
        """Names of the rewards that are trained on."""
        return {name for name, term in self.rewards.items() if term.weight > 0}

    def _require_regional_scores(self) -> None:
        """Refuses credit by region without a reward that scores regions."""
        credit = self.algorithm.credit
        for name in credit.needed_components():
            # A term of weight 0 is scored too, but credit leaves it out of the sum.
            term = self.rewards.get(name)
            if term is not None and term.gives_regions and term.weight > 0:
                continue
            problem = "which gives none or has no weight" if term else "which is not among rewards"
            able = [other for other, candidate in self.rewards.items() if candidate.gives_regions]
            raise ValueError(
                f"algorithm.credit {credit.kind!r} reads scores by region from reward {name!r}, "
                f"{problem}: name one that does in algorithm.credit.term "
                f"({', '.join(able) or 'e.g. a reward of kind region_judge'})."
            )

    def _require_background_terms(self) -> None:
        """Refuses ``background_terms`` that name no reward with a weight."""
        credit = self.algorithm.credit
        if not isinstance(credit, SplitCredit | RegionCredit):
            return
        background = set(credit.background_terms)
        # A term that scores regions scores edit and background by itself and needs no side.
        scored = self._weighted_terms() - set(credit.needed_components())
        unknown = ", ".join(sorted(background - set(self.rewards)))
        if scored and background and (scored.isdisjoint(background) or unknown):
            raise ValueError(
                f"algorithm.credit.background_terms names {', '.join(sorted(background))}, and "
                f"{unknown or 'none of it'} is no reward with a weight "
                f"({', '.join(self.rewards)}): name those that score what should stay, or give [] "
                "if none does. All others score the edit."
            )

    def _require_edit_scored(self, weighted: Set[str]) -> None:
        """Refuses split credit without a reward inside the mask."""
        credit = self.algorithm.credit
        if (
            isinstance(credit, SplitCredit)
            and credit.edit_share > 0
            and weighted <= set(credit.background_terms)
        ):
            raise ValueError(
                "algorithm.credit 'split' has no reward for the edit: "
                f"{', '.join(sorted(weighted))} score what should stay "
                "(algorithm.credit.background_terms). Add a reward that scores the edit, such as "
                "editscore or region_judge, or set algorithm.credit.edit_share to 0."
            )

    def _require_steering_term(self) -> None:
        """Refuses a steered spread whose watched score is not measured."""
        noise = self.algorithm.initial_noise
        if isinstance(noise, AdaptiveSpread) and noise.watched_term not in self.rewards:
            raise ValueError(
                f"algorithm.initial_noise.watch is {noise.watch!r}, and {noise.watched_term!r} is "
                f"not among rewards ({', '.join(self.rewards)}): nothing would be steered. Name "
                "one of them, or a component of one as TERM.COMPONENT."
            )

    def _require_even_batches(self) -> None:
        """Refuses chunks, minibatches and ranks of unequal size."""
        # Batches of equal size give equal bits, so no chunk may end within a batch.
        chunk, batch = self.rollout.chunk, self.editor.micro_batch
        if chunk is not None and chunk % batch:
            raise ValueError(
                f"rollout.chunk {chunk} is not a multiple of editor.micro_batch {batch}: a "
                "candidate's bits would depend on its chunk. "
                f"Use {max(batch, chunk // batch * batch)}."
            )
        # An uneven last part would weigh its groups more than the others.
        groups, minibatches = self.train.groups_per_update, self.train.minibatches
        if groups % minibatches:
            raise ValueError(
                f"train.groups_per_update {groups} does not divide into train.minibatches "
                f"{minibatches} equal parts: change one of them."
            )
        if groups < self.actors.num_learner:
            raise ValueError(
                f"actors.num_learner {self.actors.num_learner} exceeds train.groups_per_update "
                f"{groups}: some ranks would have nothing to learn from. Lower num_learner or "
                "raise groups_per_update."
            )

    def _require_number_format(self) -> None:
        """Refuses float16, in which the gradients of single latents vanish."""
        if self.editor.dtype == "float16":
            raise ValueError(
                "editor.dtype float16 trains nothing: gradients of single latents lie below the "
                "smallest number it has, and become zero. Use bfloat16, or float32."
            )

    def _require_attention(self) -> None:
        """Refuses a reward on attention when no attention is recorded."""
        readers = [
            name for name, term in self.rewards.items() if term.needs_attention and term.weight > 0
        ]
        if readers and self.editor.attention_layers == 0:
            raise ValueError(
                f"reward {readers[0]!r} reads attention but editor.attention_layers is 0: set it "
                "to 1 or more, or the weight to 0."
            )

    def require_measured(self, left_out: Mapping[str, str]) -> None:
        """Refuses a run that reads a reward its data cannot feed.

        Credit and exploration read rewards by name.

        Args:
            left_out: the reason for each reward that is left out (``rewards.available``).

        Raises:
            InputError: with the name of the setting, the reward and the reason.
        """
        try:
            # Checked again: the reward for the edit may be one that is left out.
            self._require_edit_scored(self._weighted_terms() - left_out.keys())
        except ValueError as error:
            reasons = "; ".join(f"{name} ({why})" for name, why in left_out.items())
            raise InputError(f"{error} Left out: {reasons}.") from error
        credit, noise = self.algorithm.credit, self.algorithm.initial_noise
        readers = {name: f"algorithm.credit {credit.kind!r}" for name in credit.needed_components()}
        if isinstance(noise, AdaptiveSpread):
            readers[noise.watched_term] = "algorithm.initial_noise.watch"
        for name, reader in readers.items():
            if name in left_out:
                raise InputError(
                    f"{reader} reads reward {name!r}, which is left out here ({left_out[name]}): "
                    "nothing could be learnt from it. Give the data what it lacks, or name a "
                    "reward that it can feed, e.g. one of kind region_judge (with "
                    "data.without_regions=mask where no task has regions)."
                )

    def judge_timeout_s(self) -> float:
        """Longest wait for remote judges that never answer, in seconds, per piece of work."""
        candidates = self.rollout.chunk or self.rollout.group_size
        return sum(term.judge_timeout_s(candidates) for term in self.rewards.values())

    def sha256(self) -> str:
        """Hash of :meth:`identity`."""
        # Sorted keys, so that the order of settings is no difference.
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Settings that change results.

        Left out are names, places of processes, budgets, and paths: the content of a path is hashed
        elsewhere.
        """
        # As JSON, in which a checkpoint stores it: a tuple read back is a list.
        content: dict[str, Any] = self.model_dump(
            mode="json", exclude={"name", "actors", "evaluation"}
        )
        content["train"] = _without(content["train"], OPERATIONAL_TRAIN)
        content["rollout"] = _without(content["rollout"], OPERATIONAL_ROLLOUT)
        # The meaning of a text's lines, and what too_long leaves out, show in the rows, which
        # are hashed with the data.
        content["data"] = _without(
            content["data"],
            {"path", "heldout_path", "strict", "text_lines", "too_long", "without_regions"},
        )
        # The data's fingerprint says how its masks were read, so a run whose masks are read as
        # before is the run of before.
        if content["data"]["mask_polarity"] == "auto":
            content["data"]["mask_polarity"] = "edit_white"
        if content["data"]["mask_from"] == "auto":
            del content["data"]["mask_from"]
        content["editor"] = _without(content["editor"], {"path", "revision", "device"})
        # The files of a built-in family's editor name the family; runs of before had no kind.
        if ":" not in self.editor.kind:
            del content["editor"]["kind"]
        # Runs of before had no choice, and measured as the default does.
        if content["editor"].get("attention_average") == "renormalised":
            del content["editor"]["attention_average"]
        # A term names what it is by its fingerprint, which hashes files that its settings name.
        content["rewards"] = {
            name: {**term.fingerprint(), "weight": term.weight, "when": term.when}
            for name, term in self.rewards.items()
        }
        return content

    def to_yaml(self) -> str:
        """The complete configuration as YAML. Reading it gives an equal value."""
        settings = self.model_dump(mode="json")
        return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _without(section: Mapping[str, Any], keys: Set[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def _merge(base: Any, change: Any) -> Any:
    """Nested mappings, merged. A changed ``kind`` replaces its mapping completely."""
    # Keys of one kind mean nothing to another, so they must not be carried over.
    if (
        isinstance(base, dict)
        and isinstance(change, Mapping)
        and change.get("kind", base.get("kind")) == base.get("kind")
    ):
        return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}
    return change
