"""What a dry run passes starts, and what would fail after the start is refused by it.

Each broken set-up is refused with exit code 2 and one line that names what is missing; each good
one passes the dry run and trains an update.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_files import write_tiny_clip
from commands import Command, assert_refused
from data_files import a_box, saved, write_folder
from rl_edit.rewards.networks.lpips import PerceptualDistance
from runs import PRESERVATION, metrics_of, small_config

Settings = list[str]
SetUp = Callable[[Path, str], Settings]
"""Writes files into a directory, given a sound editor, and returns overrides of a run."""


def judge(**transport: Any) -> str:
    """A region judge as a value of ``rewards.judge``."""
    term = {"kind": "editscore", "weight": 1.0, "transport": transport}
    return f"rewards.judge={json.dumps(term)}"


def reward(**settings: Any) -> str:
    return f"rewards.more={json.dumps(settings)}"


def copied(editor: str, place: Path) -> Path:
    return Path(shutil.copytree(editor, place / "editor"))


def lone_variant(place: Path, editor: str) -> Settings:
    root = copied(editor, place)
    for weights in root.glob("*/*.safetensors"):
        weights.rename(weights.with_name(weights.name.replace(".safe", ".fp16.safe")))
    return [f"editor.path={root}"]


def two_variants(place: Path, editor: str) -> Settings:
    lone_variant(place, editor)
    root = place / "editor"
    (weights,) = (root / "vae").glob("*.safetensors")
    weights.rename(weights.with_name(weights.name.replace("fp16", "bf16")))
    return [f"editor.path={root}"]


def without_folder(place: Path, editor: str) -> Settings:
    root = copied(editor, place)
    shutil.rmtree(root / "text_encoder_2")
    return [f"editor.path={root}"]


def other_pipeline(place: Path, editor: str) -> Settings:
    root = copied(editor, place)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxFillPipeline"}))
    return [f"editor.path={root}"]


def photographs(place: Path, _: str) -> Settings:
    """Photographs with masks, without targets, captions or regions."""
    return [f"data.path={write_folder(place / 'photographs', num_rows=6)}"]


def photographs_with(*more: str) -> SetUp:
    return lambda place, editor: [*photographs(place, editor), *more]


def regions(place: Path, _: str) -> Settings:
    root = place / "regions"
    rows = []
    for index in range(4):
        saved(root / f"p{index}.png", a_box(40, 60))
        saved(root / f"m{index}.png", a_box(40, 60))
        rows.append(
            {"image": f"p{index}.png", "mask": f"m{index}.png", "instruction": f"edit {index}"}
        )
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"data.path={root / 'rows.jsonl'}"]


def clip_without_weights(place: Path, _: str) -> Settings:
    directory = place / "clip"
    directory.mkdir()
    write_tiny_clip(directory)
    (directory / "model.safetensors").unlink()
    return [reward(kind="clip", weight=0.1, model=str(directory))]


def clip(place: Path, _: str) -> Settings:
    directory = place / "clip"
    directory.mkdir()
    return [reward(kind="clip", weight=0.1, model=write_tiny_clip(directory))]


def misspelt_model(place: Path, _: str) -> Settings:
    (place / "models" / "qwen-judge").mkdir(parents=True)
    return [judge(kind="transformers", path=str(place / "models" / "qwen-jugde"))]


def lora_as_judge(place: Path, _: str) -> Settings:
    (place / "lora").mkdir()
    (place / "lora" / "adapter_config.json").write_text("{}")
    return [judge(kind="transformers", path=str(place / "lora"))]


def other_model(place: Path, _: str) -> Settings:
    directory = place / "clip"
    directory.mkdir()
    return [judge(kind="transformers", path=write_tiny_clip(directory))]


def wrong_lpips(place: Path, _: str) -> Settings:
    from safetensors.torch import save_file

    save_file({"a": next(PerceptualDistance().parameters()).detach()}, place / "net.safetensors")
    return [reward(kind="lpips", weight=0.1, weights=str(place / "net.safetensors"))]


def cache_is_a_file(place: Path, _: str) -> Settings:
    (place / "cache").write_text("")
    return [f"rewards.preservation.cache={place / 'cache'}"]


def other_heldout(place: Path, editor: str) -> Settings:
    """Training tasks with targets, held-out photographs without."""
    photographs(place, editor)
    return [
        f"data.heldout_path={place / 'photographs'}",
        reward(kind="similarity", weight=0.5),
        'rewards.judge={"kind": "shapes_judge"}',
    ]


def just(*overrides: str) -> SetUp:
    return lambda place, editor: list(overrides)


BROKEN: dict[str, tuple[SetUp, tuple[str, ...]]] = {
    "two variants": (two_variants, ("vae: bf16", "save_pretrained")),
    "a missing folder": (without_folder, ("text_encoder_2/ is missing",)),
    "another pipeline": (other_pipeline, ("FluxFillPipeline", "trains FluxKontextPipeline")),
    "a revision of a directory": (just("editor.revision=v2"), ("'v2'", "has no revisions")),
    "no such device": (just("editor.device=gpu"), ("'gpu' is no device", "auto, cpu, cuda")),
    "too many layers": (just("editor.attention_layers=99"), ("99", "joint layers")),
    "a misspelt type of task": (
        just('data.task_types=["recolor"]'),
        ("'recolor'", "did you mean 'recolour'?"),
    ),
    "no such type on disk": (
        photographs_with('data.task_types=["edti"]'),
        ("no task of type edti, did you mean 'edit'?",),
    ),
    "a judge that needs targets": (
        photographs_with('rewards.judge={"kind": "shapes_judge"}'),
        ("'judge'", "target"),
    ),
    "captions that no task has": (
        photographs_with(reward(kind="clip", weight=0.1)),
        ("'more'", "caption"),
    ),
    "all rewards left out": (
        photographs_with(
            "rewards.preservation=null",
            "rewards.attention=null",
            'rewards.judge={"kind": "shapes_judge", "when": "if_available"}',
        ),
        ("No reward is left", "the data has no target"),
    ),
    "regions that no task has": (
        photographs_with(
            'rewards.judge={"kind": "region_judge", "transport": '
            '{"base_url": "http://127.0.0.1:9/v1", "model": "m"}}'
        ),
        ("'judge' scores region by region", "none of the", "data.without_regions=mask"),
    ),
    "another gold": (just("evaluation.gold=preservatoin"), ("did you mean 'preservation'?",)),
    "held-out tasks that are not there": (
        just("data.heldout_path=no/such/place"),
        ("held-out tasks", "no/such/place"),
    ),
    "held-out tasks without targets": (other_heldout, ("held-out tasks", "'judge'", "target")),
    "CLIP without weights": (clip_without_weights, ("'more'", "model.safetensors is missing")),
    "a hub model that is not here": (
        just(reward(kind="clip", weight=0.1, model="no-one/no-such-clip")),
        ("no-one/no-such-clip", "hf download"),
    ),
    "a misspelt judge": (misspelt_model, ("qwen-jugde", "did you mean 'qwen-judge'?")),
    "a LoRA as a judge": (lora_as_judge, ("holds a LoRA without its base", "merge-judge")),
    "a judge of another kind": (other_model, ("holds a clip model", "qwen3_vl")),
    "no vllm": (just(judge(kind="vllm", path="ORG/NAME")), ("needs the package vllm",)),
    "a key that is not set": (
        just(judge(base_url="http://127.0.0.1:9/v1", model="m", api_key_env="NO_SUCH_KEY_HERE")),
        ("NO_SUCH_KEY_HERE is not set",),
    ),
    "a key file that is not there": (
        just(judge(base_url="http://127.0.0.1:9/v1", model="m", api_key_file="/no/key")),
        ("/no/key is missing or empty",),
    ),
    "LPIPS of another file": (wrong_lpips, ("lack", "Make them again")),
    "a cache that is a file": (cache_is_a_file, ("is a file", "Name a directory")),
    "a module that is not there": (
        just(reward(kind="python", weight=1, function="no_module_here:f", low=0, high=1)),
        ("'no_module_here'", "cannot be imported"),
    ),
    "a function that is not there": (
        just(reward(kind="python", weight=1, function="math:sqrtt", low=0, high=1)),
        ("'sqrtt' does not exist", "did you mean 'sqrt'?", "'math'"),
    ),
    "a class that is not there": (
        just('rewards.more={"kind": "own_reward:Sharpnes"}'),
        ("own_reward", "Sharpnes"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_would_fail_after_the_start_is_refused_by_the_dry_run(
    rl_edit: Command, small_editor: str, tmp_path: Path, name: str
) -> None:
    set_up, words = BROKEN[name]
    small_config(small_editor, directory=tmp_path)
    overrides = [change for change in set_up(tmp_path, small_editor) if not change.endswith("=")]
    run = tmp_path / "run"
    outcome = rl_edit("train", tmp_path / "run.yaml", "--run-dir", run, "--dry-run", *overrides)
    assert_refused(outcome, run, *words)


GOOD: dict[str, SetUp] = {
    "as it is": just(),
    "a lone variant": lone_variant,
    "photographs": photographs,
    "photographs, whose masks are the regions": photographs_with("data.without_regions=mask"),
    "CLIP": clip,
    "a judge that is left out": photographs_with(
        'rewards.judge={"kind": "shapes_judge", "when": "if_available"}'
    ),
    "an evaluation during training": just("evaluation.every=1", "evaluation.gold=preservation"),
    "one type of task": just('data.task_types=["recolour"]'),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_passes_the_dry_run_starts(
    rl_edit: Command, small_editor: str, tmp_path: Path, name: str
) -> None:
    small_config(small_editor, directory=tmp_path)
    changes = GOOD[name](tmp_path, small_editor)
    overrides = [change for change in changes if not change.endswith("=")]
    run = tmp_path / "run"
    arguments = ("train", tmp_path / "run.yaml", "--run-dir", run, *overrides, "train.updates=1")
    assert rl_edit(*arguments, "--dry-run")[0] == 0
    assert not run.exists()
    code, _, err = rl_edit(*arguments)
    assert (code, list(err)) == (0, [])
    assert len(metrics_of(run)) == 1


def test_a_lone_variant_and_masks_as_regions_are_said(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, directory=tmp_path)
    _, out, _ = rl_edit(
        "train", tmp_path / "run.yaml", "--dry-run", *lone_variant(tmp_path, small_editor)
    )
    assert "exist only as variant fp16" in " ".join(out.split())


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file/run", ("is a file",)),
        ("photographs", ("is not empty and holds no run", "p0.png")),
        ("/proc/run", ("cannot be written to", "/proc")),
    ],
)
def test_a_run_directory_that_cannot_be_one_is_refused_by_the_dry_run(
    rl_edit: Command, small_editor: str, tmp_path: Path, place: str, words: tuple[str, ...]
) -> None:
    small_config(small_editor, directory=tmp_path)
    (tmp_path / "file").write_text("")
    write_folder(tmp_path / "photographs")
    outcome = rl_edit("train", tmp_path / "run.yaml", "--run-dir", tmp_path / place, "--dry-run")
    assert_refused(outcome, None, *words)


def test_a_disk_that_takes_no_file_is_refused_by_the_dry_run(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    """The limit on the size of files stands for a full disk: the system refuses the same write."""
    import resource

    small_config(small_editor, directory=tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        outcome = rl_edit(
            "train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", "--dry-run"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(outcome, tmp_path / "run", "cannot be written to", "Free space")


def test_a_misspelt_run_to_resume_is_named_beside_its_settings(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, directory=tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").write_text(yaml.safe_dump(PRESERVATION))
    missing = tmp_path / "runs" / "dmeo"
    outcome = rl_edit("train", tmp_path / "run.yaml", "--run-dir", missing, "--resume")
    assert_refused(outcome, missing, "nothing to resume", f"Did you mean {missing.parent}/demo?")


def test_a_directory_in_the_place_of_a_file_of_the_run_is_named(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, directory=tmp_path)
    run = tmp_path / "run"
    (run / "config.yaml").mkdir(parents=True)
    words = ("config.yaml", "is a directory")
    assert_refused(rl_edit("train", "--run-dir", run, "--resume"), None, *words)
    outcome = rl_edit("train", tmp_path / "run.yaml", "--run-dir", run, "--resume")
    assert_refused(outcome, None, *words, "move it away")
    (run / "config.yaml").rmdir()
    (run / "checkpoints").write_text("")
    outcome = rl_edit("train", tmp_path / "run.yaml", "--run-dir", run, "--resume")
    assert_refused(outcome, None, "checkpoints is a file", "move it away")


def test_an_edit_says_which_variant_of_the_editor_is_loaded(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    lone_variant(tmp_path, small_editor)
    image, out = saved(tmp_path / "p.png", a_box(40, 40)), tmp_path / "out.png"
    arguments = ("edit", image, "--instruction", "remove the red circle", "--output", out)
    _, text, _ = rl_edit(*arguments, "--editor", tmp_path / "editor", "--steps", 1)
    assert "exist only as variant fp16" in " ".join(text.split())


@pytest.mark.parametrize("verb", ["audit-reward", "bench-reward"])
def test_a_reward_whose_model_is_not_here_is_refused_before_it_is_measured(
    rl_edit: Command, small_editor: str, tmp_path: Path, verb: str
) -> None:
    small_config(small_editor, directory=tmp_path)
    outcome = rl_edit(verb, tmp_path / "run.yaml", *clip_without_weights(tmp_path, ""))
    assert_refused(outcome, None, "'more'", "model.safetensors is missing")


def test_a_model_that_cannot_be_loaded_ends_the_run_at_its_first_group(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    """Its files are whole, and its weights are of another size than its configuration."""
    small_config(small_editor, directory=tmp_path)
    change = clip(tmp_path, "")
    settings = tmp_path / "clip" / "config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "projection_dim": 8}))
    arguments = ("train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", *change)
    code, _, err = rl_edit(*arguments, "train.max_dropped_groups=99")
    assert code == 2
    assert "has in other sizes" in err[-1] and "projection" in err[-1]


def test_photographs_for_the_built_in_editor_are_said_before_training(
    rl_edit: Command, tmp_path: Path
) -> None:
    small_config("builtin:tiny-kontext", directory=tmp_path)
    data = write_folder(tmp_path / "photographs", num_rows=6, height=300, width=400)
    _, out, _ = rl_edit("train", tmp_path / "run.yaml", f"data.path={data}", "--dry-run")
    assert " ".join(out.split()).count("is a small editor for drawn scenes") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lora.targets=to_q", ("lora.targets", "must be a list", "'to_q'")),
        ("lora.targets=[]", ("lora.targets is empty",)),
        ('lora.targets=["to_q "]', ("'to_q '", "did you mean to_q")),
        ("editor.path={here}/run.yaml", ("no editor at", "it is a file")),
        ("editor.path={here}/kontxt", ("no editor at", "did you mean", "kontext?")),
    ],
)
def test_a_setting_of_another_form_is_named_in_words_of_yaml(
    rl_edit: Command, small_editor: str, tmp_path: Path, change: str, words: tuple[str, ...]
) -> None:
    small_config(small_editor, directory=tmp_path)
    (tmp_path / "kontext").mkdir()
    arguments = ("train", tmp_path / "run.yaml", "--dry-run", "--run-dir", tmp_path / "run")
    outcome = rl_edit(*arguments, change.format(here=tmp_path))
    assert_refused(outcome, tmp_path / "run", *words)
