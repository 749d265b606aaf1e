"""An editor family in one file trains, resumes, is evaluated and edits, by the real commands.

The family is ``examples/own_editor.py``. Nothing else knows it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rl_edit.editors import lora
from runs import command, metrics_of, read_json

EXAMPLES = Path(__file__).parent.parent / "examples"
RUN = (
    "editor={kind: own_editor:PatchConfig, resolution: 32}",
    "lora.targets=[hidden, out]",
    "lora.rank=4",
    "actors.runtime=inline",
    "actors.threads=1",
    "train.groups_per_update=2",
    "data.num_train=16",
    "evaluation.num_tasks=4",
    "evaluation.examples=0",
)


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_a_family_of_one_file_trains_two_updates_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "--preset", "tiny-flow-grpo", *RUN)
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert command(monkeypatch, capsys, *train, "train.updates=2", "--run-dir", run)[0] == 0
    assert [line["update"] for line in metrics_of(run)] == [0, 1]
    weights, config = lora.read(run / "adapter")
    assert sorted(config.targets) == ["hidden", "out"] and weights.id.step == 2
    assert all(bool(value.any()) for value in weights.tensors.values())
    # Its settings are read again from the run directory, and its numbers are repeatable.
    resume = ("train", "--run-dir", run, "--resume", "train.updates=3")
    assert command(monkeypatch, capsys, *resume)[0] == 0
    assert command(monkeypatch, capsys, *train, "train.updates=3", "--run-dir", straight)[0] == 0
    assert lora.read(run / "adapter")[0].id == lora.read(straight / "adapter")[0].id

    assert command(monkeypatch, capsys, "evaluate", run)[0] == 0
    meta = read_json(run / "evaluation.json")["meta"]
    assert meta["editor"] == "own_editor:32"
    assert meta["guidance"] is None and meta["dtype"] == "float32"

    source = tmp_path / "source.png"
    Image.new("RGB", (40, 24), (200, 40, 40)).save(source)
    edit = ("edit", source, "--instruction", "recolour it", "--adapter", run / "adapter")
    assert command(monkeypatch, capsys, *edit, "--output", tmp_path / "edited.png")[0] == 0
    assert Image.open(tmp_path / "edited.png").size[0] > 24


def test_another_setting_of_a_family_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "--preset", "tiny-flow-grpo", *RUN, "train.updates=1", "--run-dir", tmp_path)
    assert command(monkeypatch, capsys, *train)[0] == 0
    resume = ("train", "--run-dir", tmp_path, "--resume", "train.updates=2")
    code, _, err = command(monkeypatch, capsys, *resume, "editor.width=16")
    assert code == 2 and "editor.width: 32 there, 16 here" in err[-1]


def test_the_example_s_velocity_does_not_depend_on_the_batch() -> None:
    from own_editor import PatchConfig  # type: ignore[import-not-found]  # put on the path above

    from rl_edit.data import shapes

    editor = PatchConfig().load()
    conditioning = editor.encode(shapes.task("train", 0))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, *editor.latent_shape(conditioning), generator=generator)
    sigma = torch.tensor([1.0, 0.6, 0.3])
    together = editor.velocity(latents, sigma, conditioning)
    for row in range(3):
        one = editor.velocity(latents[[row]], sigma[[row]], [conditioning])
        assert torch.equal(one[0], together[row])
