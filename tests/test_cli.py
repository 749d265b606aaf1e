"""The command line: bad input is exit code 2, one line with value and remedy, and no files."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from learner.learner import Learner
from rl_edit import wire
from rl_edit.data import shapes
from rl_edit.data.compbench import write_compbench
from rl_edit.editors import lora
from rl_edit.training import train
from rl_edit.types import Candidates
from runs import PRESERVATION, command, events_of, metrics_of, read_json, small_config

ROOT = Path(__file__).parent.parent
HEADLINE = ("reward", "background_psnr_masked", "background_psnr_zero_filled", "background_ssim")
Command = Callable[..., tuple[int, str, Sequence[str]]]


def not_a_number(candidates: Candidates) -> list[float]:
    return [0.5, math.nan, 0.25, 0.125][: len(candidates.images)]


@pytest.fixture
def rl_edit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: command(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def trained(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of one update."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    train(
        small_config(small_editor, "train.updates=1", "train.learning_rate=0.1"),
        directory,
        resume=False,
    )
    yield directory


def assert_refused(outcome: tuple[int, str, Sequence[str]], run: Path | None, *words: str) -> None:
    """Exit code 2, one line with these words, and no run directory."""
    code, _, err = outcome
    assert code == 2
    (line,) = err
    assert line.startswith("rl-edit: ")
    assert [word for word in words if word not in line] == []
    assert run is None or not run.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.udpates=5", ("'train.udpates'", "did you mean 'updates'?")),
        ("optimiser.lr=5", ("'optimiser'",)),
        (
            "rollout.group_size=4",
            ("num_anchors 4", "group_size 4", "lower the anchors or raise the group"),
        ),
        ("rollout.group_size=1", ("group_size is 1", "Raise rollout.group_size")),
        ("rewards.judge.weight=-0.5", ("weight(-0.5)", "Use 0")),
        ("data.path=no/such/folder", ("no/such/folder", "does not exist", "builtin:shapes")),
        ("editor.path=/no/such/editor", ("/no/such/editor", "save_pretrained")),
    ],
)
def test_bad_settings_are_refused(
    rl_edit: Command, small_editor: str, tmp_path: Path, override: str, words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    outcome = rl_edit(
        "train",
        "--preset",
        "tiny-rc-grpo",
        "--run-dir",
        run,
        f"editor.path={small_editor}",
        "actors.runtime=inline",
        override,
    )
    assert_refused(outcome, run, *words)


def image(path: Path, *, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, value: int | None = None, *, height: int = 20, width: int = 30) -> None:
    pixels = (
        np.zeros((height, width), dtype=np.uint8)
        if value is None
        else np.full((height, width), value, dtype=np.uint8)
    )
    if value is None:
        pixels[4:9, 5:15] = 255
    Image.fromarray(pixels).save(path)


def no_mask(data: Path) -> None:
    (data / "a_mask.png").unlink()


def no_instruction(data: Path) -> None:
    (data / "a.txt").unlink()


def other_size(data: Path) -> None:
    mask(data / "a_mask.png", height=21)


def empty_mask(data: Path) -> None:
    mask(data / "a_mask.png", 0)


def full_mask(data: Path) -> None:
    mask(data / "a_mask.png", 255)


def no_image(data: Path) -> None:
    (data / "a.png").write_text("this is a letter, not an image")


def missing_row(data: Path) -> None:
    (data / "metadata.jsonl").write_text(
        '{"source": "gone.png", "instruction": "remove it", "mask": "a_mask.png"}\n'
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_mask, ("a.png", "has no mask", "a_mask.png")),
        (no_instruction, ("a.png", "has no instruction", "a.txt")),
        (other_size, ("a_mask.png is 30x21", "a.png is 30x20", "same width and height")),
        (empty_mask, ("a_mask.png is empty or full", "data.empty_mask=skip")),
        (full_mask, ("a_mask.png is empty or full", "data.mask_polarity")),
        (no_image, ("a.png",)),
        (missing_row, ("metadata.jsonl line 1", "gone.png", "not found")),
    ],
)
def test_bad_data_is_refused(
    rl_edit: Command,
    small_editor: str,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for name in ("a", "b"):
        image(data / f"{name}.png")
        mask(data / f"{name}_mask.png")
        (data / f"{name}.txt").write_text("remove the scratch")
    damage(data)
    settings = (f"editor.path={small_editor}", "actors.runtime=inline", f"data.path={data}")
    assert_refused(
        rl_edit("train", "--preset", "tiny-rc-grpo", "--run-dir", run, *settings), run, *words
    )


def test_a_reward_that_gives_nan_is_refused_and_leaves_no_run(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    term = {"kind": "python", "function": f"{__name__}:not_a_number", "low": 0.0, "high": 1.0}
    small_config(
        small_editor, rewards={"preservation": PRESERVATION, "own": term}, directory=tmp_path
    )
    run = tmp_path / "run"
    assert_refused(
        rl_edit("train", tmp_path / "run.yaml", "--run-dir", run),
        run,
        "own: gave nan",
        "not a finite number",
        "Fix the reward function",
    )


def test_an_existing_run_is_not_overwritten_without_resume(rl_edit: Command, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert_refused(
        rl_edit("train", trained / "config.yaml", "--run-dir", trained),
        None,
        str(trained),
        "--resume",
        "another --run-dir",
    )
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_resuming_with_other_settings_is_refused_and_changes_nothing(
    rl_edit: Command, trained: Path
) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    outcome = rl_edit(
        "train",
        trained / "config.yaml",
        "--run-dir",
        trained,
        "--resume",
        "train.learning_rate=0.2",
    )
    assert_refused(outcome, None, "belongs to another run", "new --run-dir")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def on_disk(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run directory of one update on tasks that lie on the disk, and these tasks."""
    directory = tmp_path_factory.mktemp("on_disk")
    write_compbench((shapes.task("train", index) for index in range(4)), directory / "tasks")
    train(
        small_config(small_editor, "train.updates=1", f"data.path={directory / 'tasks'}"),
        directory / "run",
        resume=False,
    )
    return directory / "run", directory / "tasks"


@pytest.mark.parametrize("other", ["data", "editor"])
def test_resuming_on_other_data_or_another_editor_is_refused_and_changes_nothing(
    rl_edit: Command, on_disk: tuple[Path, Path], tmp_path: Path, other: str
) -> None:
    run, _ = on_disk
    write_compbench((shapes.task("train", index, seed=1) for index in range(4)), tmp_path / "tasks")
    override = {
        "data": f"data.path={tmp_path / 'tasks'}",
        "editor": "editor.path=builtin:tiny-kontext",
    }[other]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = rl_edit("train", "--run-dir", run, "--resume", "train.updates=2", override)
    assert_refused(outcome, None, "belongs to another run", f"content.{other}")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.updates=1",), ("has done 2 updates", "train.updates is 1")),
        (
            ("train.updates=3", "train.ema_decay=0.9", "--allow-config-drift", "train.ema_decay"),
            ("no average of result", "ema_decay"),
        ),
        (
            ("train.updates=3", "lora.rank=2", "--allow-config-drift", "lora.rank"),
            ("lora settings",),
        ),
    ],
)
def test_a_resume_that_cannot_go_on_leaves_what_the_run_says_of_itself(
    rl_edit: Command,
    small_editor: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    train(small_config(small_editor, "train.updates=2"), run, resume=False)
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "run.json")}
    outcome = rl_edit("train", "--run-dir", run, "--resume", *arguments)
    assert_refused(outcome, None, *words)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert rl_edit("train", "--run-dir", run, "--resume", "train.updates=3")[0] == 0
    assert [line["update"] for line in metrics_of(run)] == [0, 1, 2]


def test_a_run_that_learnt_nothing_is_a_failure_that_says_why(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(
        small_editor, "train.updates=2", "algorithm.credit.min_spread=10", directory=tmp_path
    )
    arguments = ("train.updates=2", "algorithm.credit.min_spread=10")
    code, _, (line,) = rl_edit(
        "train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", *arguments
    )
    assert (
        code == 3
        and "nothing was learnt in 2 updates" in line
        and "4 times spread: no reward term differs" in line
    )
    assert read_json(tmp_path / "run" / "run.json")["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_goes_on_where_its_data_and_its_editor_have_moved_to(
    rl_edit: Command, on_disk: tuple[Path, Path], small_editor: str, tmp_path: Path
) -> None:
    run, tasks = (Path(shutil.copytree(path, tmp_path / path.name)) for path in on_disk)
    editor = shutil.copytree(small_editor, tmp_path / "editor")
    places = (f"data.path={tasks}", f"editor.path={editor}")
    assert rl_edit("train", "--run-dir", run, "--resume", "train.updates=2", *places)[0] == 0
    assert [line["update"] for line in metrics_of(run)] == [0, 1]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_stopped_saves_what_it_did_and_resumes_to_the_bytes_of_one_that_was_not(
    rl_edit: Command, small_editor: str, tmp_path: Path, number: signal.Signals
) -> None:
    run, complete = tmp_path / "run", tmp_path / "complete"
    small_config(small_editor, "train.updates=1", directory=tmp_path)
    arguments = [
        sys.executable,
        "-m",
        "rl_edit",
        "train",
        str(tmp_path / "run.yaml"),
        "--run-dir",
        str(run),
    ]
    endless = ["train.updates=100000", "train.checkpoint_every=100000"]
    process = subprocess.Popen(
        [*arguments, *endless], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not metrics_of(run):
            assert process.poll() is None and time.monotonic() < deadline, "no update was done"
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (128 + number, "")
    assert out.endswith(f"rl-edit train --run-dir {run} --resume\n")
    record, done = read_json(run / "run.json"), len(metrics_of(run))
    assert record["status"] == "stopped"
    assert [path.name for path in run.glob("checkpoints/step_*")] == [f"step_{done:06d}"]
    assert (
        str(lora.read(run / "adapter")[0].id) == record["adapter"] == metrics_of(run)[-1]["adapter"]
    )
    assert rl_edit("train", "--run-dir", run, "--resume", f"train.updates={done + 1}")[0] == 0
    assert (
        rl_edit("train", tmp_path / "run.yaml", "--run-dir", complete, f"train.updates={done + 1}")[
            0
        ]
        == 0
    )
    files = [directory / "adapter" / lora.WEIGHTS_FILE for directory in (run, complete)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [line["adapter"] for line in metrics_of(run)] == [
        line["adapter"] for line in metrics_of(complete)
    ]


def test_there_must_be_something_to_resume(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, directory=tmp_path)
    run = tmp_path / "run"
    assert_refused(
        rl_edit("train", tmp_path / "run.yaml", "--run-dir", run, "--resume"),
        run,
        "nothing to resume",
        "drop --resume",
    )


def test_the_same_command_with_auto_resume_starts_a_run_and_then_continues_it(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, directory=tmp_path)
    again = (
        "train",
        tmp_path / "run.yaml",
        "--run-dir",
        tmp_path / "run",
        "--auto-resume",
        "train.updates=2",
    )
    assert rl_edit(*again)[0] == 0
    begun = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert rl_edit(*again)[0] == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == begun
    assert [
        e["updates_done"]
        for e in events_of(tmp_path / "run", "started") + events_of(tmp_path / "run", "resumed")
    ] == [0, 2]


def test_a_file_cannot_be_a_run_directory(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor, directory=tmp_path)
    assert config.name == "small"
    path = tmp_path / "run.yaml"
    before = path.read_bytes()
    assert_refused(rl_edit("train", path, "--run-dir", path), None, "is a file")
    assert path.read_bytes() == before


def test_a_dry_run_writes_nothing(rl_edit: Command, small_editor: str, tmp_path: Path) -> None:
    small_config(small_editor, directory=tmp_path)
    code, out, err = rl_edit(
        "train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", "--dry-run"
    )
    assert (code, list(err)) == (0, [])
    assert "3 updates x 2 groups x 4 candidates" in " ".join(out.split())
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_its_settings_its_record_its_metrics_and_a_stock_adapter(
    trained: Path, small_editor: str
) -> None:
    record = read_json(trained / "run.json")
    assert record["status"] == "done"
    assert record["config_sha256"] == small_config(small_editor, "train.learning_rate=0.1").sha256()
    assert {"torch", "diffusers", "ray", "python"} <= set(record["versions"])
    weights, lora_config = lora.read(trained / "adapter")
    assert str(weights.id) == record["adapter"] == metrics_of(trained)[-1]["adapter"]
    assert (lora_config.rank, lora_config.alpha) == (4, 8)
    assert [path.name for path in trained.glob("checkpoints/step_*")] == ["step_000001"]


def test_more_updates_continue_a_finished_run(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    small_config(small_editor, "train.updates=1", directory=tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump(yaml.safe_load((tmp_path / "run.yaml").read_text()))
        )
    assert (
        rl_edit("train", tmp_path / "one.yaml", "--run-dir", tmp_path / "one", "train.updates=2")[0]
        == 0
    )
    assert (
        rl_edit("train", tmp_path / "two.yaml", "--run-dir", tmp_path / "two", "train.updates=1")[0]
        == 0
    )
    assert rl_edit("train", "--run-dir", tmp_path / "two", "--resume", "train.updates=2")[0] == 0
    assert (
        lora.read(tmp_path / "one" / "adapter")[0].id
        == lora.read(tmp_path / "two" / "adapter")[0].id
    )


def test_evaluate_compares_base_and_trained_on_the_same_tasks(
    rl_edit: Command, trained: Path
) -> None:
    code, out, err = rl_edit("evaluate", trained)
    assert (code, list(err)) == (0, [])
    assert "evaluation.json" in "".join(out.split())
    result = read_json(trained / "evaluation.json")
    for side in ("base", "trained", "delta"):
        for metric in HEADLINE:
            interval = result[side][metric]
            assert set(interval) == {"mean", "low", "high", "n"}
            assert interval["n"] == 3
            assert interval["low"] <= interval["mean"] <= interval["high"]
    for metric in HEADLINE:
        difference = result["trained"][metric]["mean"] - result["base"][metric]["mean"]
        assert result["delta"][metric]["mean"] == pytest.approx(difference, abs=1e-6)
    assert result["delta"]["background_psnr_masked"]["mean"] != 0.0
    images = {path.stem for path in trained.glob("evaluation/images/*/*.png")}
    assert images == {
        "source",
        "mask",
        "target",
        "base",
        "trained",
        "attention_base",
        "attention_trained",
    }
    assert not list(trained.glob(".*.tmp"))


def test_an_evaluation_put_elsewhere_leaves_the_runs_own_as_it_is(
    rl_edit: Command, trained: Path, tmp_path: Path
) -> None:
    assert rl_edit("evaluate", trained)[0] == 0
    before = (trained / "evaluation.json").read_bytes()
    code, out, _ = rl_edit("evaluate", trained, "--out", tmp_path / "other", "data.seed=9")
    assert code == 0 and "rl-edit report" not in out
    elsewhere = read_json(tmp_path / "other" / "evaluation.json")
    assert elsewhere["meta"]["tasks"] != read_json(trained / "evaluation.json")["meta"]["tasks"]
    assert (tmp_path / "other" / "evaluation" / "images").is_dir()
    assert (trained / "evaluation.json").read_bytes() == before
    assert_refused(
        rl_edit("evaluate", trained, "--out", trained / "run.json"), None, "run.json is a file"
    )


def test_evaluate_gives_the_same_numbers_twice(rl_edit: Command, trained: Path) -> None:
    results = []
    for _ in range(2):
        assert rl_edit("evaluate", trained)[0] == 0
        results.append((trained / "evaluation.json").read_bytes())
    assert results[0] == results[1]


def test_an_adapter_of_no_update_differs_from_the_base_by_exactly_zero(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    lora.save(run / "adapter", wire.unpack(Learner(config, threads=1).export()[1]), config.lora)
    assert rl_edit("evaluate", run)[0] == 0
    delta = read_json(run / "evaluation.json")["delta"]
    assert set(HEADLINE) <= set(delta)
    assert {(value["mean"], value["low"], value["high"]) for value in delta.values()} == {
        (0.0, 0.0, 0.0)
    }


@pytest.mark.parametrize("judges", [("judge",), ("second", "first"), ()])
def test_the_instruction_score_is_that_of_the_first_judge_and_absent_without_one(
    rl_edit: Command, small_editor: str, tmp_path: Path, judges: tuple[str, ...]
) -> None:
    terms = {
        name: {"kind": "shapes_judge", "weight": 1.0, "coarse": index > 0}
        for index, name in enumerate(judges)
    }
    config = small_config(
        small_editor, "evaluation.examples=0", rewards={**terms, "preservation": PRESERVATION}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    lora.save(
        tmp_path / "adapter", wire.unpack(Learner(config, threads=1).export()[1]), config.lora
    )
    _, out, _ = rl_edit("evaluate", tmp_path)
    base = read_json(tmp_path / "evaluation.json")["base"]
    assert "held-out tasks: 3;" in " ".join(out.split())
    assert ("instruction score" in out) == bool(judges)
    assert base.get("instruction") == (base[f"{judges[0]}.instruction"] if judges else None)


def test_evaluate_needs_a_run_and_its_adapter(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    assert_refused(
        rl_edit("evaluate", tmp_path / "none"), None, str(tmp_path / "none"), "rl-edit train"
    )
    (tmp_path / "config.yaml").write_text(small_config(small_editor).to_yaml())
    assert_refused(rl_edit("evaluate", tmp_path), None, "no adapter at", "RUN/adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_an_altered_adapter_is_refused(rl_edit: Command, trained: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (trained / "adapter").iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-1] ^= 1
        (adapter / path.name).write_bytes(content)
    assert_refused(
        rl_edit("evaluate", trained, "--adapter", adapter), None, "the adapter was altered"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.png", "--instruction", "remove it"), ("nowhere.png",)),
        (("photo.png", "--instruction", "  "), ("--instruction is empty",)),
        (
            ("photo.png", "--instruction", "remove it", "--adapter", "nowhere"),
            ("no adapter at nowhere",),
        ),
        (("photo.png", "--instruction", "remove it", "--output", "out.xyz"), ("out.xyz", ".png")),
        (
            ("photo.png", "--instruction", "remove it", "--output", "no/such/out.png"),
            ("no/such", "not a directory"),
        ),
        (("letter.png", "--instruction", "remove it"), ("letter.png",)),
    ],
)
def test_edit_refuses_what_it_cannot_read_or_write(
    rl_edit: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "photo.png")
    (tmp_path / "letter.png").write_text("dear reader")
    assert_refused(rl_edit("edit", *arguments), None, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.png", "photo.png"]


def test_the_lists_name_every_preset_and_method(rl_edit: Command) -> None:
    from rl_edit.config import presets
    from rl_edit.method.algorithms import METHODS

    assert all(name in rl_edit("presets")[1] for name in presets())
    assert all(name in rl_edit("methods")[1] for name in METHODS)


def test_make_shapes_writes_what_train_reads(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    code, _, _ = rl_edit("dataset", "make-shapes", tmp_path / "shapes", "--count", "4")
    assert code == 0
    small_config(small_editor, directory=tmp_path)
    code, out, _ = rl_edit(
        "train",
        tmp_path / "run.yaml",
        "--run-dir",
        tmp_path / "run",
        "--dry-run",
        f"data.path={tmp_path / 'shapes'}",
    )
    assert code == 0
    assert "from 3 tasks" in " ".join(out.split())


def test_a_process_says_one_line_without_a_trace_and_loads_no_model_library_to_do_so(
    tmp_path: Path,
) -> None:
    program = (
        "import sys\nfrom rl_edit.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    libraries = {'diffusers', 'transformers', 'peft', 'ray', 'accelerate'}\n"
        "    print(sorted(libraries & set(sys.modules)))\n"
    )
    arguments = [
        sys.executable,
        "-c",
        program,
        "train",
        "--preset",
        "tiny-rc-grpo",
        "train.udpates=5",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        arguments,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "did you mean 'updates'?" in line
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
