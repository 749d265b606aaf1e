"""``rl-edit edit``: files and folders, adapters side by side, and images of every kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Command, assert_refused
from rl_edit.cli.edit_files import Source, Targets, adapter_names
from rl_edit.editors import editor_config, load_editor, lora
from rl_edit.editors.lora import LoraConfig
from rl_edit.errors import InputError

WORDS = ("--instruction", "remove the red circle", "--steps", "2")


def draw(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB", **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, size=(*size[::-1], 3), dtype=np.uint8)
    if mode == "I;16":
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(pixels).convert(mode).save(path, **more)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def adapters(small_editor: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of different ranks, as two runs leave them."""
    transformer = load_editor(editor_config({"path": small_editor})).transformer
    places = []
    for number, rank in enumerate((4, 8)):
        config = LoraConfig(rank=rank, alpha=2 * rank)
        name = f"adapter{number}"
        lora.attach(transformer, config, seed=number, adapter_name=name)
        generator = torch.Generator().manual_seed(number)
        for parameter in lora.parameters(transformer, adapter_name=name):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        place = tmp_path_factory.mktemp("run") / f"first-{number}" / "adapter"
        lora.save(place, lora.export(transformer, step=1, adapter_name=name), config)
        places.append(place)
    return places


def test_each_adapter_beside_others_edits_as_it_does_alone_and_scale_zero_is_the_base(
    rl_edit: Command,
    small_editor: str,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "a.png")

    def edit(*more: object) -> None:
        code, _, err = rl_edit("edit", "a.png", "--editor", small_editor, *WORDS, *more)
        assert (code, list(err)) == (0, [])

    both = ("--adapter", adapters[0], "--adapter", adapters[1])
    edit(*both, "--base", "--strip")
    together = {
        name: pixels(Path("edited") / f"a_{name}.png") for name in ("base", "first-0", "first-1")
    }
    edit("--output", "alone.png")
    assert np.array_equal(pixels(Path("alone.png")), together["base"])
    for number, adapter in enumerate(adapters):
        edit("--adapter", adapter)
        single = pixels(Path("a_edited.png"))
        assert np.array_equal(single, together[f"first-{number}"])
        assert not np.array_equal(single, together["base"])
        edit("--adapter", adapter, "--adapter-scale", "0")
        assert np.array_equal(pixels(Path("a_edited.png")), together["base"])
    drawn = pixels(Path("edited/a_strip.png"))
    images = [pixels(Path("a.png")), *together.values()]
    for place, image in enumerate(images):
        left = place * 68
        assert np.array_equal(drawn[-64:, left : left + 64], image)


def test_a_folder_is_edited_in_batches_to_the_same_images_and_what_is_left_out_is_said(
    rl_edit: Command, small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        draw(tmp_path / "in" / f"{number}.png", (64, 64 + number // 3))
    draw(tmp_path / "in" / "below" / "0.jpg", (96, 48))
    (tmp_path / "in" / "letter.txt").write_text("dear reader")
    (tmp_path / "in" / "raw.nef").write_bytes(b"raw")
    # A folder to train on: the masks are no images to edit.
    draw(tmp_path / "in" / "0_mask.png", mode="L")
    draw(tmp_path / "in" / "masks" / "1.png", mode="L")
    code, out, err = rl_edit("edit", "in", "--editor", small_editor, *WORDS, "--output", "out")
    assert (code, list(err)) == (0, [])
    assert "1 file of a folder is no image and is left out. (first: in/letter.txt)" in out
    assert "2 files of a folder are masks or targets and are left out" in out
    assert "is an image that cannot be read and is left out. (first: in/raw.nef: .nef is a" in out
    assert "6 of 6 images" in out and "below/0_edited.png (88x48, from 96x48)" in out, out
    written = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.png"))
    assert written == [*[f"{n}_edited.png" for n in range(5)], "below/0_edited.png"]
    rl_edit("edit", "in/4.png", "--editor", small_editor, *WORDS)
    assert np.array_equal(pixels(Path("4_edited.png")), pixels(Path("out/4_edited.png")))


@pytest.mark.parametrize(
    ("name", "size", "mode", "edited"),
    [
        ("alpha.png", (64, 64), "RGBA", (64, 64)),
        ("palette.png", (64, 64), "P", (64, 64)),
        ("gray.png", (64, 64), "L", (64, 64)),
        ("sixteen.png", (64, 64), "I;16", (64, 64)),
        ("printing.jpg", (64, 64), "CMYK", (64, 64)),
        ("turned.jpg", (80, 60), "RGB", (56, 72)),
        ("one.png", (1, 1), "RGB", (64, 64)),
        ("long.png", (20_000, 4), "RGB", (256, 16)),
    ],
)
def test_an_odd_image_is_edited_upright_on_a_canvas_of_its_aspect(
    rl_edit: Command,
    small_editor: str,
    tmp_path: Path,
    name: str,
    size: tuple[int, int],
    mode: str,
    edited: tuple[int, int],
) -> None:
    turned = Image.Exif()
    if name == "turned.jpg":
        turned[0x0112] = 6
    source = draw(tmp_path / name, size, mode, **({"exif": turned} if len(turned) else {}))
    target = tmp_path / "out.png"
    code, out, err = rl_edit("edit", source, "--editor", small_editor, *WORDS, "--output", target)
    assert (code, list(err)) == (0, [])
    assert Image.open(target).size == edited
    assert f"({edited[0]}x{edited[1]}, from " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.png", "b/a.png"), ("a.png", "b/a.png", "one result")),
        (("a.png", "a.png"), ("a.png", "twice")),
        (("empty",), ("no image in empty",)),
        (("a.png", "c.png", "--output", "one.png"), ("one.png", "several results", "folder")),
        (("a.png", "--adapter-scale", "0.5"), ("--adapter-scale 0.5", "--adapter")),
        (("a.png", "--base"), ("--base", "--adapter")),
    ],
)
def test_what_cannot_be_named_or_placed_is_refused_before_the_editor_loads(
    rl_edit: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "c.png", "b/a.png"):
        draw(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(rl_edit("edit", *arguments, *WORDS), None, *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_adapter_is_taken_for_the_base_or_writes_over_another_result(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("base", "strip", "a", "x/a", "a-2", "y/a")]
    for run in runs:
        (run / "adapter").mkdir(parents=True)
    names = adapter_names([run / "adapter" for run in runs])
    assert names == ["base-2", "strip-2", "a", "a-2", "a-2-2", "a-3"]
    sources = [Source(path=Path(stem), stem=stem, size=(8, 8)) for stem in ("one", "one_b")]
    with pytest.raises(InputError, match=r"one and one_b would have one result"):
        Targets.of(sources, ["b_c", "c"], tmp_path / "out", strip=False)


def test_a_run_called_base_edits_by_its_adapter(
    rl_edit: Command,
    small_editor: str,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "a.png")
    shutil.copytree(adapters[0], tmp_path / "base" / "adapter")
    images = []
    for number, place in enumerate(("base/adapter", adapters[0], None)):
        more = () if place is None else ("--adapter", place)
        output = f"{number}.png"
        rl_edit("edit", "a.png", "--editor", small_editor, *WORDS, "--output", output, *more)
        images.append(pixels(Path(output)))
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
