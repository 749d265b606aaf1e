"""Every LoRA target fits a module, which is known before any weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rl_edit.editors import BUILTIN_WEIGHTS, editor_config, require_targets
from rl_edit.editors.lora import LoraConfig
from rl_edit.editors.lora_targets import unmatched
from rl_edit.errors import InputError
from runs import command


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in editor's directory without a weight file."""
    folder = tmp_path_factory.mktemp("editor") / "editor"
    shutil.copytree(
        BUILTIN_WEIGHTS, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")
    )
    return folder


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("to_qq", "to_q"),
        ("add_qproj", "add_q_proj"),
        ("attn.to_k_", "to_k"),
        ("to_out", r"to_out\.0"),
        ("proj_mpl", "proj_mlp"),
    ],
)
def test_a_misspelt_target_among_good_ones_is_refused_with_the_nearest_names(
    target: str, near: str, without_weights: Path
) -> None:
    config = LoraConfig(rank=2, targets=("to_k", target, "to_v"))
    words = rf"^lora\.targets {target} \(did you mean .*{near}.*\?\) fits? no module"
    with pytest.raises(InputError, match=words):
        require_targets(editor_config({"path": str(without_weights)}), config)


@pytest.mark.parametrize("targets", [("attn",), ("0",), ("transformer_blocks",), ("xyzzy",), ()])
def test_targets_that_are_no_layer_are_refused(
    targets: tuple[str, ...], without_weights: Path
) -> None:
    with pytest.raises(InputError, match=r"lora\.targets") as caught:
        require_targets(
            editor_config({"path": str(without_weights)}), LoraConfig(rank=2, targets=targets)
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "targets", [("to_q",), ("attn.to_q", "ff.net.2"), ("to_out.0", "proj_out")]
)
def test_short_and_long_names_that_fit_are_taken(
    targets: tuple[str, ...], without_weights: Path
) -> None:
    config = editor_config({"path": str(without_weights)})
    require_targets(config, LoraConfig(rank=2, targets=targets))
    assert unmatched(config.skeleton(), targets) is None


def test_a_family_without_a_skeleton_is_checked_when_the_adapter_is_attached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    editor = editor_config({"kind": "own_editor:PatchConfig"})
    require_targets(editor, LoraConfig(targets=("hiden",)))
    code, _, errors = command(
        monkeypatch,
        capsys,
        *("train", "--preset", "tiny-flow-grpo", "--run-dir", tmp_path / "run"),
        *("editor={kind: own_editor:PatchConfig}", "lora.targets=[hiden, out]"),
        *("actors.runtime=inline", "train.updates=1"),
    )
    assert code == 2 and "lora.targets hiden (did you mean hidden?)" in errors[-1]


def test_the_dry_run_refuses_a_misspelt_target_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train = ("train", "--preset", "tiny-rc-grpo", "--run-dir", tmp_path / "run", "--dry-run")
    code, _, errors = command(monkeypatch, capsys, *train, "lora.targets=[to_qq, to_k]")
    assert code == 2 and len(errors) == 1 and "to_qq (did you mean to_q" in errors[0]
    assert not (tmp_path / "run").exists()
    assert command(monkeypatch, capsys, *train, "lora.targets=[to_q, to_k]")[0] == 0


def test_an_editor_whose_configuration_is_of_another_model_is_refused_in_one_line(
    without_weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "editor"
    shutil.copytree(without_weights, folder)
    (folder / "transformer" / "config.json").write_text('{"num_layers": "two"}')
    with pytest.raises(InputError, match=r"transformer/config\.json") as caught:
        require_targets(editor_config({"path": str(folder)}), LoraConfig())
    assert "\n" not in str(caught.value)
