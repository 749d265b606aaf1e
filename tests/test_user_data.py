"""A user's images, from a telephone and a paint program, can be trained on and edited."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from rl_edit.data.canvas import canvas_size
from rl_edit.editors import editor_config, load_editor
from runs import command, metrics_of, read_json

SIZES = {
    "street.jpg": (67, 101),
    "sign.png": (90, 121),
    "cutout.png": (75, 75),
    "room.jpg": (143, 64),
}
"""Upright (height, width) of each image."""
INSTRUCTION = "remove the red circle"


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """Something with gradients, texture and an object."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    base = np.stack([rows / height, columns / width, 0.5 + 0.3 * np.sin(columns / 9)], axis=-1)
    noisy = base * 200 + generator.normal(0, 8, size=(height, width, 3)) + 20
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse(
        (width // 4, height // 4, width // 2, height // 2), fill=(220, 40, 30)
    )
    return image


def stroke(height: int, width: int) -> Image.Image:
    """A soft, hand-drawn mask: blurred edges, painted over the object."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).ellipse(
        (width // 4 - 3, height // 4 - 3, width // 2 + 3, height // 2 + 3), fill=255
    )
    return image.filter(ImageFilter.GaussianBlur(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of odd sizes, with a mask and a text beside each.

    They are a turned JPEG, a palette PNG, a transparent PNG and a plain JPEG.
    """
    data = tmp_path_factory.mktemp("photos")
    images = {name: photograph(*size, seed=seed) for seed, (name, size) in enumerate(SIZES.items())}
    turned = Image.Exif()
    turned[0x0112] = 6
    # Orientation 6: a viewer turns the stored pixels a quarter clockwise.
    images["street.jpg"].transpose(Image.Transpose.ROTATE_90).save(
        data / "street.jpg", exif=turned, quality=92
    )
    images["sign.png"].quantize(32).save(data / "sign.png")
    transparent = images["cutout.png"].convert("RGBA")
    transparent.putalpha(
        Image.fromarray(np.where(np.indices((75, 75)).sum(axis=0) < 20, 0, 255).astype(np.uint8))
    )
    transparent.save(data / "cutout.png")
    images["room.jpg"].save(data / "room.jpg", quality=80)
    for name, size in SIZES.items():
        stem = Path(name).stem
        stroke(*size).save(data / f"{stem}_mask.png")
        (data / f"{stem}.txt").write_text(f"{INSTRUCTION}\n")
    return data


@pytest.fixture(scope="module")
def run(
    folder: Path, small_editor: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The run directory of one update of the shipped preset on the folder, and its output."""
    directory = tmp_path_factory.mktemp("runs") / "own"
    small = (
        "actors.runtime=inline", "actors.threads=1", "train.updates=1", "train.groups_per_update=3",
        "rollout.group_size=4", "rollout.num_steps=3",
        "algorithm.objective={kind: neighbor, num_anchors: 2}", "train.allow_unrewarded_edit=true",
    )  # fmt: skip
    arguments = (
        "train",
        "--preset",
        "tiny-rc-grpo",
        f"data.path={folder}",
        f"editor.path={small_editor}",
        *small,
        "--run-dir",
        directory,
    )
    with pytest.MonkeyPatch.context() as patch:
        code, out, err = command(patch, Captured(), *arguments)
    assert (code, list(err)) == (0, [])
    return directory, " ".join(out.split())


class Captured:
    """Captures standard output and error of a fixture that serves the module.

    The capture of a single test does not reach it.
    """

    def __init__(self) -> None:
        import contextlib
        import io

        self._texts = (io.StringIO(), io.StringIO())
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(contextlib.redirect_stdout(self._texts[0]))
        self._stack.enter_context(contextlib.redirect_stderr(self._texts[1]))
        self._started = False

    def readouterr(self) -> tuple[str, str]:
        """Empty at first, as a clearing call; then everything, and the streams are given back."""
        if not self._started:
            self._started = True
            return "", ""
        self._stack.close()
        return self._texts[0].getvalue(), self._texts[1].getvalue()


def test_a_folder_of_photos_trains_with_the_rewards_it_can_feed(run: tuple[Path, str]) -> None:
    directory, _ = run
    (line,) = metrics_of(directory)
    assert line["groups/used"] == 3
    assert line["ratio/max_deviation"] == 0.0
    assert line["gradient/norm"] > 0
    for term in ("preservation", "attention"):
        assert math.isfinite(line[f"reward/{term}/mean"])
        assert line[f"reward/{term}/spread"] > 0
    assert not [key for key in line if "judge" in key]


def test_the_reward_that_was_left_out_is_named_with_the_reason(run: tuple[Path, str]) -> None:
    directory, output = run
    assert "left out reward judge: the data has no" in output
    (left_out,) = read_json(directory / "run.json")["left_out_rewards"]
    assert left_out.startswith("judge: the data has no ")


def test_every_change_of_size_is_in_the_plan_and_in_the_record(
    run: tuple[Path, str], small_editor: str
) -> None:
    directory, output = run
    canvases = read_json(directory / "run.json")["canvases"]
    multiple = load_editor(editor_config({"path": small_editor})).pixels_per_token
    resolution = editor_config({"path": small_editor}).resolution
    upright = Counter(SIZES.values())
    known = {f"{width}x{height}": count for (height, width), count in upright.items()}
    # One of the four images is held out.
    assert {each["size"]: each["tasks"] for each in canvases}.items() < known.items()
    total = sum(each["tasks"] for each in canvases)
    assert total == len(SIZES) - 1
    for each in canvases:
        width, height = map(int, each["size"].split("x"))
        fitted = canvas_size(height, width, resolution, multiple)
        assert each["canvas"] == f"{fitted[1]}x{fitted[0]}"
    resized = sum(each["tasks"] for each in canvases if each["size"] != each["canvas"])
    assert f"{resized} of {total} images are resized to the editor's canvas" in output


@pytest.mark.parametrize("name", list(SIZES))
def test_any_of_the_photos_can_be_edited_upright_and_in_its_proportions(
    run: tuple[Path, str],
    folder: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    output = tmp_path / "edited.png"
    adapter = run[0] / "adapter"
    arguments = (
        "edit",
        folder / name,
        "--instruction",
        INSTRUCTION,
        "--adapter",
        adapter,
        "--output",
        output,
        "--steps",
        2,
    )
    code, _, err = command(monkeypatch, capsys, *arguments)
    assert (code, list(err)) == (0, [])
    with Image.open(output) as edited:
        width, height = edited.size
        pixels = np.asarray(edited.convert("RGB"))
    upright_height, upright_width = SIZES[name]
    assert width % 8 == height % 8 == 0
    assert 0.7 * 64**2 <= width * height <= 1.4 * 64**2
    assert abs(math.log(width / height) - math.log(upright_width / upright_height)) < 0.25
    assert pixels.std() > 0


def test_an_edit_is_repeatable_and_depends_on_its_seed(
    run: tuple[Path, str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def edited(name: str, *options: object) -> bytes:
        arguments = (
            "edit",
            folder / "sign.png",
            "--instruction",
            INSTRUCTION,
            "--output",
            tmp_path / name,
            "--steps",
            2,
            *options,
        )
        assert command(monkeypatch, capsys, *arguments)[0] == 0
        return (tmp_path / name).read_bytes()

    adapter = ("--adapter", run[0] / "adapter")
    assert edited("a.png", *adapter) == edited("b.png", *adapter)
    assert edited("c.png", *adapter, "--seed", 1) != edited("d.png", *adapter)


def test_without_an_output_name_the_result_is_written_where_one_stands_and_not_among_the_photos(
    run: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    photo, here = tmp_path / "photos" / "photo.jpg", tmp_path / "here"
    photo.parent.mkdir()
    here.mkdir()
    photograph(60, 80, seed=9).save(photo)
    before = photo.read_bytes()
    monkeypatch.chdir(here)
    code, out, _ = command(
        monkeypatch,
        capsys,
        "edit",
        photo,
        "--instruction",
        INSTRUCTION,
        "--adapter",
        run[0] / "adapter",
        "--steps",
        1,
    )
    assert code == 0
    assert [path.name for path in here.iterdir()] == ["photo_edited.png"]
    assert "photo_edited.png" in "".join(out.split())
    assert list(photo.parent.iterdir()) == [photo]
    assert photo.read_bytes() == before
