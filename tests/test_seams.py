"""Seams: a method of somebody's own trains without an edit anywhere else, no loop knows a method,
and what cannot work is refused.

The made-up method below, an objective and a credit rule, is all that such a person writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit.config import RunConfig, load_config
from rl_edit.errors import InputError
from rl_edit.method.advantages import Advantages, Declined
from rl_edit.method.algorithms import METHODS, Algorithm
from rl_edit.method.objectives import Policy, ReplayPoint, Setting, Velocities
from rl_edit.method.regions import UniformRows
from rl_edit.types import LossOutput, RewardTable, RolloutGroup
from runs import adapter_bytes, command, metrics_of, run_inline, small_config

ROOT = Path(__file__).resolve().parent.parent

# --- a made-up method
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Imitated:
    """Finished samples to imitate, and how much."""

    clean: Tensor
    gain: Tensor


class Imitation(BaseModel):
    """Regression on the finished samples of the better candidates: at the stored states, towards
    where they ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["test_seams:Imitation"] = "test_seams:Imitation"
    held: float = Field(default=0.1, ge=0)

    @property
    def policies(self) -> frozenset[Policy]:
        return frozenset({"reference"})

    def check(self, setting: Setting) -> None:
        if setting.num_steps < 3:
            raise ValueError(
                f"imitates from the third step on, and rollout.num_steps is {setting.num_steps}: "
                "use at least 3."
            )

    def trained_steps(self, levels: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        return (0, len(levels) - 1)

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: torch.Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        gain, points = advantages.values[:, 0].clamp(min=0), []
        for part in torch.arange(len(gain)).split(states_per_forward or len(gain)):
            context = Imitated(clean=group.next_latents[part, -1], gain=gain[part])
            sigma = group.sigmas[0].expand(len(part))
            points.append(
                ReplayPoint(
                    latents=group.latents[part, 0],
                    sigma=sigma,
                    context=context,
                    weight=len(part) / len(gain),
                )
            )
        return points

    def loss(self, point: ReplayPoint, velocities: Velocities) -> LossOutput:
        found = point.latents - point.sigma[:, None, None] * velocities.policy
        error = (found - point.context.clean).square().mean(dim=(1, 2))
        drift = (velocities.policy - velocities.of("reference")).square().mean()
        return LossOutput(
            loss=(point.context.gain * error).mean() + self.held * drift,
            metrics={"imitation/error": error.detach().mean()},
        )


class BestOnly(BaseModel):
    """The best candidate by the sum of its weighted terms is worth 1, all others nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["test_seams:BestOnly"] = "test_seams:BestOnly"
    normalise: Literal["none"] = "none"
    worth: float = 1.0

    def needed_components(self) -> tuple[str, ...]:
        return ()

    def __call__(
        self, tables: Sequence[RewardTable], areas: Sequence[Tensor]
    ) -> list[Advantages | Declined]:
        found: list[Advantages | Declined] = []
        for table, where in zip(tables, areas, strict=True):
            total = (table.values * torch.tensor(table.weights)).sum(dim=1)
            values = torch.zeros(len(total), 1)
            values[int(total.argmax())] = self.worth
            rows = UniformRows()(where.any(dim=0).flatten())
            found.append(Advantages(values=values, regions=rows, weights=torch.ones(1)))
        return found


class Loose(Imitation):
    """Takes any key."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: Literal["test_seams:Loose"] = "test_seams:Loose"  # type: ignore[assignment]


class Unsteady(Imitation):
    """Its check raises what it should not."""

    kind: Literal["test_seams:Unsteady"] = "test_seams:Unsteady"  # type: ignore[assignment]

    def check(self, setting: Setting) -> None:
        raise KeyError("forgotten")


class Taught(Imitation):
    """Reads a velocity that nobody has."""

    kind: Literal["test_seams:Taught"] = "test_seams:Taught"  # type: ignore[assignment]

    @property
    def policies(self) -> frozenset[Any]:
        return frozenset({"teacher"})


class Opaque(Imitation):
    """Has a setting that no file can hold."""

    kind: Literal["test_seams:Opaque"] = "test_seams:Opaque"  # type: ignore[assignment]
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    device: object = object()


# --- and ones that are none
# ------------------------------------------------------------------------------------------


class Mutable(BaseModel):
    kind: Literal["test_seams:Mutable"] = "test_seams:Mutable"


class Idle(BaseModel):
    """Neither loss nor replay."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["test_seams:Idle"] = "test_seams:Idle"

    @property
    def policies(self) -> frozenset[Policy]:
        return frozenset()

    def check(self, setting: Setting) -> None:
        pass

    def trained_steps(self, levels: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        return (0,)


class NoModel:
    kind = "test_seams:NoModel"


MADE_UP = (
    "algorithm={initial_noise: {inside: 0.7, outside: 0.05}, "
    "objective: {kind: 'test_seams:Imitation', held: 0.2}, credit: {kind: 'test_seams:BestOnly'}}"
)


def made_up(editor: str, *overrides: str, directory: Path | None = None) -> RunConfig:
    return small_config(editor, MADE_UP, *overrides, directory=directory)


def test_a_made_up_objective_and_credit_rule_train_through_the_real_loop(
    small_editor: str, tmp_path: Path
) -> None:
    config = made_up(small_editor, "train.updates=2", "train.states_per_forward=3")
    outcome = run_inline(config, tmp_path / "run")
    assert outcome.updates_done == 2 and outcome.adapter is not None
    assert any(
        bool(tensor.any()) for name, tensor in outcome.adapter.tensors.items() if "lora_B" in name
    )
    written = metrics_of(tmp_path / "run")
    assert len(written) == 2 and all("imitation/error" in str(record) for record in written)
    other = run_inline(
        made_up(
            small_editor,
            "train.updates=2",
            "train.states_per_forward=3",
            "algorithm.objective.held=5",
        ),
        tmp_path / "other",
    )
    assert adapter_bytes(other) != adapter_bytes(outcome)


def test_a_made_up_method_interrupted_and_resumed_ends_with_the_same_bytes(
    small_editor: str, tmp_path: Path
) -> None:
    config = made_up(small_editor, "train.updates=2")
    whole = run_inline(config, tmp_path / "whole")
    run_inline(config, tmp_path / "cut", stop_after=1)
    assert adapter_bytes(run_inline(config, tmp_path / "cut", resume=True)) == adapter_bytes(whole)


def test_a_made_up_method_survives_the_round_trip_through_config_yaml(
    small_editor: str, tmp_path: Path
) -> None:
    config = made_up(small_editor)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "config.yaml")
    assert (
        again == config
        and again.sha256() == config.sha256()
        and again.to_yaml() == config.to_yaml()
    )
    assert (
        isinstance(again.algorithm.objective, Imitation) and again.algorithm.objective.held == 0.2
    )
    assert isinstance(again.algorithm.credit, BestOnly)
    other = made_up(small_editor, "algorithm.objective.held=0.3")
    assert other.sha256() != config.sha256()


def test_a_made_up_objective_can_be_wrapped_and_given_as_an_object(small_editor: str) -> None:
    wrapped = small_config(
        small_editor,
        "algorithm={objective: {kind: background_regularised, target: source, inner: {kind: "
        "'test_seams:Imitation'}}}",
    )
    assert isinstance(wrapped.algorithm.objective.inner, Imitation)  # type: ignore[attr-defined]
    assert wrapped.algorithm.objective.policies == {"reference"}
    given = Algorithm(objective=Imitation(held=3), credit=BestOnly(worth=2))
    assert given.objective == Imitation(held=3)
    assert Algorithm.model_validate(given.model_dump(mode="json")) == given


def test_a_made_up_methods_own_refusals_name_the_seam(small_editor: str) -> None:
    said = refusal(small_editor, MADE_UP, "rollout.num_steps=2")
    assert (
        "algorithm.objective 'test_seams:Imitation' imitates from the third step on" in said
        and "use at least 3" in said
    )


def refusal(editor: str, *overrides: str, rewards: dict[str, Any] | None = None) -> str:
    """What is said about a small run with these overrides. One line."""
    with pytest.raises(InputError) as error:
        small_config(editor, *overrides, rewards=rewards)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("seam", "kind", "words"),
    [
        (
            "objective",
            "no_such_module:Ratio",
            ("'no_such_module:Ratio'", "cannot be imported", "PYTHONPATH"),
        ),
        (
            "objective",
            "test_seams:Absent",
            ("'test_seams:Absent'", "has no frozen pydantic model 'Absent'"),
        ),
        ("objective", "test_seams:", ("'test_seams:'", "has no frozen pydantic model")),
        ("objective", "test_seams:refusal", ("no frozen pydantic model 'refusal'",)),
        ("objective", "test_seams:NoModel", ("no frozen pydantic model 'NoModel'",)),
        ("objective", "test_seams:Mutable", ("no frozen pydantic model 'Mutable'",)),
        ("objective", "test_seams:Idle", ("lacks loss, replay", "algorithm.objective")),
        ("objective", "test_seams:BestOnly", ("lacks", "replay", "algorithm.objective")),
        ("credit", "test_seams:Imitation", ("lacks", "needed_components", "algorithm.credit")),
        ("objective", "test_seams:Loose", ("takes any key", "extra='forbid'")),
        ("objective", "test_seams:Unsteady", ("its check raised KeyError", "forgotten")),
        ("objective", "test_seams:Taught", ("teacher", "reference and acting")),
        ("objective", "test_seams:Opaque", ("cannot be written", "plain values")),
        ("credit", "no_such_module:Rule", ("cannot be imported",)),
    ],
)
def test_a_class_that_is_no_method_is_refused_in_one_line(
    small_editor: str, seam: str, kind: str, words: tuple[str, ...]
) -> None:
    said = refusal(small_editor, f"algorithm={{{seam}: {{kind: '{kind}'}}}}")
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    "kind",
    ["broken_in_syntax:Ratio", "broken_when_run:Ratio", "leaves_when_run:Ratio", ".relative:Ratio"],
)
def test_a_module_that_cannot_be_run_is_refused_in_one_line(
    small_editor: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_in_syntax.py").write_text("def (:\n")
    (tmp_path / "broken_when_run.py").write_text("1 / 0\n")
    (tmp_path / "leaves_when_run.py").write_text("raise SystemExit(5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert repr(kind) in refusal(small_editor, f"algorithm={{objective: {{kind: '{kind}'}}}}")


def test_a_made_up_methods_options_are_checked_like_all_others(small_editor: str) -> None:
    assert "held" in refusal(small_editor, MADE_UP, "algorithm.objective.held=-1")
    assert "unknown key" in refusal(small_editor, MADE_UP, "algorithm.objective.hold=1")


def test_the_command_line_shows_a_made_up_method_and_refuses_a_bad_one_with_exit_code_two(
    small_editor: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made_up(small_editor, directory=tmp_path)
    code, out, err = command(monkeypatch, capsys, "show-config", tmp_path / "run.yaml", MADE_UP)
    assert (code, list(err)) == (0, []) and "test_seams:Imitation" in out and "held: 0.2" in out
    code, _, err = command(
        monkeypatch,
        capsys,
        "show-config",
        tmp_path / "run.yaml",
        "algorithm.objective={kind: 'test_seams:Idle'}",
    )
    assert code == 2 and len(err) == 1 and "lacks loss, replay" in err[0]


# --- no loop knows a method
# -------------------------------------------------------------------------------------------

LOOPS = sorted(
    [
        *(ROOT / "learner").glob("*.py"),
        *(ROOT / "actors").glob("*.py"),
        ROOT / "rl_edit/method/rollout.py",
        ROOT / "rl_edit/method/update.py",
    ]
)
NAMED = re.compile(
    "|".join(sorted({re.escape(name).replace(r"\-", "[-_ ]?") for name in METHODS}))
    + r"|grpo|flow[-_ ]?grpo|dance[-_ ]?grpo|mix[-_ ]?grpo|(?<![a-z])nft(?![a-z])"
    + r"|diffusion[-_ ]?nft|co[-_ ]?co[-_ ]?edit|spatial[-_ ]?flow"
    + r"|edit[-_]r1|edit[-_ ]?score|arxiv",
    re.IGNORECASE,
)


def test_the_words_that_name_a_method_are_recognised() -> None:
    assert all(
        NAMED.search(f"as in {name}, say")
        for name in [*METHODS, "flow_grpo", "MixGRPO", "DiffusionNFT", "CoCoEdit", "SpatialFlow"]
    )
    assert not NAMED.search("mixed groups, a flow of grouped edits, an nftables rule")


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_loop_mentions_a_method_or_paper_in_code_comment_or_docstring(path: Path) -> None:
    found = [
        (number, line)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if NAMED.search(line)
    ]
    assert found == []


# --- impossible combinations
# ------------------------------------------------------------------------------------------

JUDGED = {
    "judge": {"kind": "shapes_judge", "weight": 1.0},
    "preservation": {"kind": "preservation", "weight": 0.3},
}
PLAIN = {"preservation": {"kind": "preservation", "weight": 1.0}}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_with_one_candidate_is_refused(small_editor: str, name: str) -> None:
    said = refusal(
        small_editor,
        f"algorithm={{name: {name}}}",
        "rollout.group_size=1",
        "rollout.num_steps=4",
        rewards=JUDGED,
    )
    assert (
        "rollout.group_size is 1" in said
        and "every advantage is zero" in said
        and "Raise rollout.group_size" in said
    )


@pytest.mark.parametrize(
    ("overrides", "rewards", "words"),
    [
        (
            ("editor.attention_layers=0",),
            None,
            ("'attention'", "editor.attention_layers is 0", "set it to 1 or more"),
        ),
        (
            ("algorithm={name: spatialflow-grpo}",),
            PLAIN,
            ("algorithm.credit 'region'", "reward 'judge'", "not among rewards", "region_judge"),
        ),
        (
            ("algorithm={name: spatialflow-grpo, credit: {term: preservation}}",),
            JUDGED,
            ("reward 'preservation'", "gives none", "algorithm.credit.term (judge)"),
        ),
        (
            ("algorithm={name: spatialflow-grpo}", "rewards.judge.weight=0"),
            JUDGED,
            ("reward 'judge'", "has no weight"),
        ),
        (
            ("algorithm={name: flow-grpo}", "rollout.solver=dpm++"),
            PLAIN,
            ("stochastic steps", "multistep", "rollout.solver euler"),
        ),
        (
            ("algorithm={objective: {kind: transition}}", "rollout.solver=dpm++"),
            PLAIN,
            ("algorithm.objective 'transition'", "multistep", "rollout.solver euler"),
        ),
        (
            ("algorithm={name: mixgrpo, step_noise: {size: 8}}", "rollout.num_steps=6"),
            PLAIN,
            ("algorithm.step_noise.size 8", "rollout.num_steps 6", "smaller window"),
        ),
        (
            ("algorithm={name: mixgrpo, step_noise: {stop: 6}}", "rollout.num_steps=6"),
            PLAIN,
            ("algorithm.step_noise.stop 6", "at most 5"),
        ),
        (
            ("algorithm.step_noise={kind: constant}",),
            PLAIN,
            ("algorithm.objective 'neighbor'", "step_noise {kind: none}", "transition"),
        ),
        (
            (
                "algorithm.step_noise={kind: constant}",
                "algorithm.objective={kind: background_regularised, inner: {num_anchors: 2}}",
            ),
            PLAIN,
            ("inner 'neighbor'", "step_noise {kind: none}"),
        ),
        (
            ("algorithm={objective: {kind: transition}}",),
            PLAIN,
            ("algorithm.objective 'transition'", "step_noise {kind: constant}", "neighbor"),
        ),
        (
            ("algorithm.initial_noise={inside: 0.7, keep_reference: false, background_pull: 0.5}",),
            PLAIN,
            ("background_pull 0.5", "keep_reference is false", "set it to true"),
        ),
        (
            ("algorithm.initial_noise={inside: 0, outside: 0}",),
            PLAIN,
            ("no spread", "all candidates would be one", "step_noise"),
        ),
        (
            ("algorithm.objective={num_anchors: 4}",),
            PLAIN,
            ("num_anchors 4", "3 perturbed candidates", "raise the group"),
        ),
        (
            ("algorithm={name: flow-grpo, step_noise: {sde: cps, level: 1.5}}",),
            PLAIN,
            ("level 1.5", "cps", "at most 1"),
        ),
    ],
)
def test_an_impossible_combination_is_refused_when_the_config_is_read(
    small_editor: str,
    overrides: tuple[str, ...],
    rewards: dict[str, Any] | None,
    words: tuple[str, ...],
) -> None:
    said = refusal(small_editor, *overrides, rewards=rewards)
    assert [word for word in words if word not in said] == []


def test_locality_with_stochastic_steps_is_refused_when_their_density_is_trained(
    small_editor: str,
) -> None:
    held = "initial_noise: {inside: 0.7, keep_reference: true, background_pull: 0.5}"
    said = refusal(small_editor, f"algorithm={{name: flow-grpo, {held}}}", rewards=PLAIN)
    assert "background_pull 0.5" in said


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_as_it_is_fits_an_editors_usual_rollout(name: str) -> None:
    METHODS[name].algorithm.check(group_size=12, num_steps=8, multistep=False)
    assert METHODS[name].algorithm.name == name and "arXiv" in METHODS[name].citation
