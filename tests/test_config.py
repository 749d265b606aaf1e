"""Configurations: what is valid is what runs, and what is not is one line with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rl_edit.config import RunConfig, is_default, load_config, presets, validated
from rl_edit.config.reference import reference
from rl_edit.errors import InputError
from rl_edit.method.algorithms import METHODS
from runs import command, small_config

TINY = "tiny-rc-grpo"


def problem(*overrides: str, preset: str = TINY) -> str:
    """The error of a preset with these overrides. It is one line."""
    with pytest.raises(InputError) as refusal:
        load_config(preset=preset, overrides=overrides)
    message = str(refusal.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "named", "nearest"),
    [
        ("trian.updates=5", "'trian'", "'train'"),
        ("sede=5", "'sede'", "'seed'"),
        ("train.udpates=5", "'train.udpates'", "'updates'"),
        ("algorithm.objectve.clip=0.1", "'algorithm.objectve'", "'objective'"),
        (
            "algorithm.objective.inner.tempreature=0.1",
            "'algorithm.objective.inner.tempreature'",
            "'temperature'",
        ),
        ("algorithm.initial_noise.insde=0.1", "'algorithm.initial_noise.insde'", "'inside'"),
        ("rewards.judge.wieght=1", "'rewards.judge.wieght'", "'weight'"),
        ("rewards.preservation.celing_db=30", "'rewards.preservation.celing_db'", "'ceiling_db'"),
        ("editor.resolutoin=64", "'editor.resolutoin'", "'resolution'"),
    ],
)
def test_an_unknown_key_at_any_depth_is_named_whole_with_the_nearest_known_one(
    override: str, named: str, nearest: str
) -> None:
    message = problem(override)
    assert f"unknown key {named}" in message
    assert f"did you mean {nearest}?" in message


def test_a_key_like_no_other_is_answered_with_the_known_ones() -> None:
    message = problem("train.zzzzzz=5")
    assert "unknown key 'train.zzzzzz'" in message
    assert "learning_rate" in message and "updates" in message


@pytest.mark.parametrize("written", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_a_number_in_any_notation_is_that_number(written: str) -> None:
    assert (
        load_config(preset=TINY, overrides=[f"train.learning_rate={written}"]).train.learning_rate
        == 1e-5
    )


def test_a_number_without_a_dot_is_read_from_a_file_as_well(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rewards: {keep: {kind: preservation}}\ntrain: {learning_rate: 3e-4}\n")
    assert load_config(path).train.learning_rate == 3e-4


def test_an_override_creates_the_mappings_on_its_way(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rewards: {keep: {kind: preservation}}\n")
    config = load_config(
        path,
        overrides=[
            "algorithm.initial_noise.inside=0.4",
            "train.updates=7",
            "rewards.look.kind=concentration",
        ],
    )
    assert config.algorithm.initial_noise.inside == 0.4
    assert config.train.updates == 7
    assert sorted(config.rewards) == ["keep", "look"]
    assert config.rewards["look"].name == "look"


def test_the_last_override_of_a_key_counts() -> None:
    assert load_config(preset=TINY, overrides=["seed=1", "seed=2"]).seed == 2


def test_a_reward_set_to_null_is_gone() -> None:
    assert "judge" not in load_config(preset=TINY, overrides=["rewards.judge=null"]).rewards


@pytest.mark.parametrize("override", ["train.updates", "=5", "--updates=5"])
def test_what_is_no_override_is_said_to_be_none(override: str) -> None:
    assert "dotted.key=value" in problem(override)


def test_a_named_method_supplies_every_seam_and_other_keys_adjust_it() -> None:
    rewards = {"judge": {"kind": "shapes_judge"}, "preservation": {"kind": "preservation"}}
    raw: dict[str, Any] = {"rewards": rewards, "rollout": {"group_size": 8}}
    for name, method in METHODS.items():
        assert validated({**raw, "algorithm": {"name": name}}, "test").algorithm == method.algorithm
    adjusted = validated(
        {**raw, "algorithm": {"name": "neighbor-grpo", "initial_noise": {"inside": 0.5}}}, "test"
    ).algorithm
    bundle = METHODS["neighbor-grpo"].algorithm
    assert adjusted.initial_noise == bundle.initial_noise.model_copy(update={"inside": 0.5})
    assert (adjusted.credit, adjusted.objective) == (bundle.credit, bundle.objective)


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_another_method_by_its_name_is_that_method_and_not_a_mixture_with_the_presets(
    order: int,
) -> None:
    changed = load_config(
        preset=TINY,
        overrides=["algorithm.name=diffusion-nft", "algorithm.objective.beta=0.5"][::order],
    )
    expected = METHODS["diffusion-nft"].algorithm
    assert changed.algorithm == expected.model_copy(
        update={"objective": expected.objective.model_copy(update={"beta": 0.5})}
    )
    same = load_config(preset=TINY, overrides=["algorithm.name=rc-grpo"])
    assert same == load_config(preset=TINY) and same.algorithm != METHODS["rc-grpo"].algorithm


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        (
            "tiny-edit-grpo",
            ("rewards.preservation=null", "rewards.same={kind: psnr}"),
            ("background_terms", "preservation", "judge, same"),
        ),
        (
            "tiny-edit-grpo",
            ("algorithm.credit.background_terms=[preservation, jugde]",),
            ("jugde", "judge, preservation"),
        ),
        ("tiny-edit-grpo", ("rewards.preservation.weight=0",), ("background_terms", "judge")),
        (
            "tiny-spatialflow-grpo",
            ("algorithm.credit.background_terms=[presevation]",),
            ("presevation", "judge, preservation"),
        ),
        (
            TINY,
            ("algorithm.initial_noise={kind: adaptive, watch: editscore}",),
            ("watch is 'editscore'", "judge, preservation"),
        ),
        (
            TINY,
            ("algorithm.initial_noise={kind: adaptive, watch: jugde.instruction}",),
            ("'jugde' is not among rewards",),
        ),
    ],
)
def test_a_reward_that_is_named_and_not_there_is_refused(
    preset: str, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = problem(*overrides, preset=preset)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "overrides",
    [("rewards.judge=null",), ("algorithm.credit.background_terms=[judge, preservation]",)],
)
def test_credit_split_by_area_needs_a_reward_for_the_edit(overrides: tuple[str, ...]) -> None:
    message = problem(*overrides, preset="tiny-edit-grpo")
    assert "no reward for the edit" in message and "edit_share to 0" in message
    assert load_config(
        preset="tiny-edit-grpo", overrides=[*overrides, "algorithm.credit.edit_share=0"]
    )


def test_a_reward_for_the_edit_that_is_left_out_is_none() -> None:
    with pytest.raises(
        InputError, match=r"no reward for the edit.* Left out: judge \(the data has no target\)"
    ):
        load_config(preset="tiny-edit-grpo").require_measured({"judge": "the data has no target"})


def test_no_reward_need_judge_the_background() -> None:
    config = load_config(
        preset="tiny-edit-grpo",
        overrides=["rewards.preservation=null", "algorithm.credit.background_terms=[]"],
    )
    assert list(config.rewards) == ["judge"]
    assert load_config(
        preset="tiny-spatialflow-grpo", overrides=["rewards.preservation=null"]
    ).rewards.keys() == {"judge"}


@pytest.mark.parametrize(
    ("preset", "override", "reader"),
    [
        ("tiny-spatialflow-grpo", "seed=1", "algorithm.credit 'region'"),
        (TINY, "algorithm.initial_noise={kind: adaptive}", "algorithm.initial_noise.watch"),
    ],
)
def test_a_reward_that_credit_or_noise_reads_may_not_be_left_out(
    preset: str, override: str, reader: str
) -> None:
    config = load_config(preset=preset, overrides=[override])
    config.require_measured({"attention": "no setting reads it"})
    with pytest.raises(
        InputError,
        match=f"{reader} reads reward 'judge', which is left out here .the data has no target.*"
        "region_judge",
    ):
        config.require_measured({"judge": "the data has no target"})


def test_a_seam_of_another_kind_replaces_the_method_s_whole() -> None:
    objective = load_config(
        preset=TINY, overrides=["algorithm.objective={kind: background_regularised, weight: 0.3}"]
    ).algorithm.objective
    assert (objective.kind, objective.weight) == ("background_regularised", 0.3)


def test_a_method_s_value_can_be_switched_off() -> None:
    assert load_config(preset="tiny-neighbor-grpo").algorithm.credit.quasi_norm == 0.8
    assert (
        load_config(
            preset="tiny-neighbor-grpo", overrides=["algorithm.credit.quasi_norm=null"]
        ).algorithm.credit.quasi_norm
        is None
    )


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    assert "unknown method 'rc-gpro', did you mean 'rc-grpo'?" in problem("algorithm.name=rc-gpro")


def test_an_unknown_kind_is_answered_with_the_nearest() -> None:
    assert (
        "rewards.judge.kind: unknown value 'shapes_juge', did you mean 'shapes_judge'?"
        in problem("rewards.judge.kind=shapes_juge")
    )


@pytest.mark.parametrize("unknown", ["rc-grpo", "tiny-rc-gpro", "tiny_rc_grpo"])
def test_an_unknown_preset_is_answered_with_the_nearest(unknown: str) -> None:
    with pytest.raises(
        InputError, match=f"unknown preset '{unknown}', did you mean 'tiny-rc-grpo'"
    ):
        load_config(preset=unknown)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("rollout.group_size=1",), ("rollout.group_size is 1", "Raise rollout.group_size")),
        (("rollout.group_size=4",), ("num_anchors 4", "3 perturbed", "group_size 4")),
        (("algorithm.objective.inner.num_anchors=8",), ("num_anchors 8", "7 perturbed")),
        (
            ("algorithm.objective.inner.num_anchors=0",),
            ("algorithm.objective.inner.num_anchors", "got 0"),
        ),
        (("rollout.group_size=0",), ("rollout.group_size", "got 0")),
        (
            ("algorithm.initial_noise.inside=0", "algorithm.initial_noise.outside=0"),
            ("no spread", "inside"),
        ),
        (("algorithm.initial_noise.inside=1.5",), ("algorithm.initial_noise.inside", "got 1.5")),
        (("editor.attention_layers=0",), ("'attention'", "editor.attention_layers is 0")),
        (
            (
                "rewards.judge.weight=0",
                "rewards.preservation.weight=0",
                "rewards.attention.weight=0",
            ),
            ("no reward has a positive weight",),
        ),
        (("rewards.judge.weight=-1",), ("rewards.judge", "weight(-1", "negative")),
        (("rewards.judge.weight=.nan",), ("rewards.judge", "nan")),
        (("train.updates=0",), ("train.updates", "got 0")),
        (("train.updates=many",), ("train.updates", "'many'")),
        (("train.max_lag=2",), ("train.max_lag", "got 2")),
        (
            ("algorithm.step_noise={kind: constant, level: 0.7}",),
            ("deterministic trajectories", "algorithm.step_noise", "transition"),
        ),
        (("data.path=builtin:circles",), ("'builtin:circles'", "builtin:shapes")),
        (("actors.runtime=slurm",), ("actors.runtime", "'slurm'")),
        (("algorithm.name=[]",), ("name [] is no method's name", "rc-grpo")),
        (("editor.guidance=.inf",), ("editor.guidance", "finite")),
        (("train.learning_rate=.inf",), ("train.learning_rate", "finite")),
        (
            ("algorithm.credit={normalise: none}", "algorithm.name=custom"),
            ("algorithm.credit names no kind", "algorithm.credit.kind"),
        ),
        (("editor.dtype=float16",), ("float16", "bfloat16")),
        (("train.minibatches=3",), ("train.groups_per_update 8", "train.minibatches 3")),
        (
            ("algorithm.name=diffusion-nft", "editor.true_cfg=4"),
            ("'forward_process'", "guided", "editor.true_cfg to 1"),
        ),
        (("algorithm.name=cocoedit", "editor.true_cfg=4"), ("guided", "editor.true_cfg to 1")),
    ],
)
def test_what_cannot_work_is_refused_with_its_value_before_anything_is_loaded(
    overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = problem(*overrides)
    assert [word for word in words if word not in message] == []


def test_anchors_may_be_all_perturbed_candidates_but_not_the_reference() -> None:
    exact = ("rollout.group_size=5", "algorithm.objective.inner.num_anchors=4")
    assert load_config(preset=TINY, overrides=exact).algorithm.objective.inner.num_anchors == 4
    assert "one is the unperturbed reference" in problem(
        "rollout.group_size=4", "algorithm.objective.inner.num_anchors=4"
    )
    without = ("rollout.group_size=4", "algorithm.initial_noise.keep_reference=false")
    assert load_config(preset=TINY, overrides=without).rollout.group_size == 4


def test_an_attention_reward_that_is_only_measured_asks_for_no_layers_of_others() -> None:
    config = load_config(
        preset=TINY, overrides=["editor.attention_layers=0", "rewards.attention.weight=0"]
    )
    assert config.editor.attention_layers == 0


def test_several_problems_are_one_line_that_counts_them() -> None:
    message = problem("train.updates=0", "sede=1", "rollout.group_size=0")
    assert "and 2 more" in message


@pytest.mark.parametrize("preset", sorted(presets()))
def test_every_preset_is_valid_and_says_what_it_is(preset: str) -> None:
    config = load_config(preset=preset)
    assert config.name == preset
    assert config.algorithm.name in METHODS
    assert presets()[preset]


@pytest.mark.parametrize("preset", sorted(presets()))
def test_what_show_config_prints_is_the_same_run(preset: str, tmp_path: Path) -> None:
    config = load_config(
        preset=preset, overrides=["train.learning_rate=1e-5", "data.task_types=[add, remove]"]
    )
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config
    assert again.sha256() == config.sha256()


def test_an_open_range_survives_the_round_trip(small_editor: str, tmp_path: Path) -> None:
    term = {"kind": "python", "function": "math:fsum", "low": float("-inf"), "high": float("inf")}
    config = small_config(small_editor, rewards={"mine": term})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_show_config_prints_everything_that_can_be_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(
        monkeypatch, capsys, "show-config", "--preset", TINY, "train.updates=7"
    )
    assert (code, list(err)) == (0, [])
    shown = yaml.safe_load(out)
    assert shown["train"]["updates"] == 7
    assert set(shown) == set(RunConfig.model_fields)


def test_a_setting_is_at_its_default_under_the_kind_that_is_chosen() -> None:
    identity = load_config(preset=TINY, overrides=["train.inner_epochs=3"]).identity()
    at_default = ["train.minibatches", "algorithm.credit.min_spread", "editor.true_cfg"]
    at_default += ["rewards.judge.coarse", "algorithm.objective.inner.num_anchors"]
    changed = ["train.inner_epochs", "algorithm.credit.normalise", "algorithm.objective.kind"]
    no_setting = ["train.nothing", "rewards.judge", "content.data", "algorithm.credit.edit_share"]
    assert [name for name in at_default if not is_default(name, identity)] == []
    assert [name for name in [*changed, *no_setting] if is_default(name, identity)] == []


def test_the_reference_of_all_settings_is_what_the_models_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(monkeypatch, capsys, "show-config", "--reference")
    assert code == 0
    written = (Path(__file__).parents[1] / "docs" / "config.md").read_text()
    assert out == written, "run: rl-edit show-config --reference > docs/config.md"


def test_the_reference_has_a_row_for_every_key_with_type_default_and_source() -> None:
    rows = reference().splitlines()
    assert "| `updates` | int ≥ 1 | `50` |" in "\n".join(rows)
    (row,) = [row for row in rows if row.startswith("| `learning_rate` ")]
    assert "`0.0003`" in row and "flow_grpo" in row
    for key in RunConfig.model_fields:
        assert any(row.startswith(f"| `{key}` | ") for row in rows), key
    assert [row for row in rows if row.startswith("| `") and row.endswith("|  |")] == []
    assert "(#algorithmobjective-forward_process)" in "\n".join(rows)
    assert "#### algorithm.objective: forward_process" in rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("", "must be a mapping"),
        ("seed: 1\n", "rewards"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=words) as refusal:
        load_config(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "seed: 1\ntrain: {updates: 2}\nname: x\ntrain: {learning_rate: 1}\n",
            "'train' stands in line 2 and again in line 4",
        ),
        (
            "seed: 1\ntrain: {updates: 2, updates: 3}\n",
            "'updates' stands in line 2 and again in line 2",
        ),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        load_config(tmp_path / "run.yaml")


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        load_config(path)
    with pytest.raises(InputError, match="no config file at"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="give a YAML file, or --preset"):
        load_config()


def test_the_kontext_preset_reaches_the_download_and_says_in_one_line_why_it_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    code, _, err = command(
        monkeypatch, capsys, "train", "--preset", "kontext-rc-grpo", "--run-dir", tmp_path / "run"
    )
    assert code == 2
    (line,) = err
    assert "black-forest-labs/FLUX.1-Kontext-dev from the Hugging Face hub" in line
    assert "hf auth login" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("train:\n\tupdates: 1\n", "Line 2 begins with a tab: use spaces"),
    ],
)
def test_a_file_without_settings_is_named_for_what_it_is(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        load_config(tmp_path / "run.yaml")


def test_spaces_around_an_override_are_no_part_of_its_key() -> None:
    assert load_config(preset="tiny-rc-grpo", overrides=["train.updates = 7"]).train.updates == 7
