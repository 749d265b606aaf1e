"""Folders and tables as people bring them: every file is a row, part of a row, or counted."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_files import a_box, an_image, saved, write_folder, write_lines
from rl_edit.data import DataConfig, Dataset, file_kinds, open_dataset
from rl_edit.data.notices import Notice
from rl_edit.errors import InputError


def opened(path: Path, split: Any = "train", **options: Any) -> Dataset:
    return open_dataset(DataConfig(path=str(path), **options), split)


def notices(path: Path, **options: Any) -> dict[str, Notice]:
    return {notice.kind: notice for notice in opened(path, **options).notices}


def tasks(path: Path, **options: Any) -> dict[str, str]:
    """Instruction by id, of both splits."""
    found = {}
    for split in ("train", "heldout"):
        dataset = opened(path, split, **options)
        found |= {
            dataset[index].task_id: dataset[index].instruction for index in range(len(dataset))
        }
    return found


def a_row(root: Path, name: str, seed: int = 0, text: str | None = "go") -> None:
    saved(root / f"{name}.png", an_image(24, 30, seed=seed))
    saved(root / f"{name}_mask.png", a_box(24, 30))
    if text is not None:
        (root / f"{name}.txt").write_text(text)


def test_an_image_of_an_unreadable_kind_is_counted_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "images", num_rows=3)
    for name in ("a.heic", "b.CR2", "c.svg"):
        (tmp_path / "images" / name).write_bytes(b"any")
    (tmp_path / "images" / "a.txt").write_text("go")
    saved(tmp_path / "masks" / "a.png", a_box(8, 8))
    if file_kinds.HAS_HEIF:
        monkeypatch.setattr(file_kinds, "SUFFIXES", tuple(set(file_kinds.SUFFIXES) - {".heic"}))
    found = [n for n in opened(tmp_path).notices if n.kind == "unreadable-kinds"]
    texts = sorted(map(str, found))
    assert len(texts) == 3
    assert "1 of 6 images is not used: .cr2 is a camera's raw file" in texts[0]
    assert ".heic needs pillow-heif (pip install pillow-heif) (first: images/a.heic)" in texts[1]
    # The mask and the text of that image are no orphans.
    assert not {"masks-without-image", "texts-without-image"} & {*notices(tmp_path)}
    assert len(tasks(tmp_path)) == 3


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.fromarray(an_image(64, 64)).save(tmp_path / "a.heic")
    saved(tmp_path / "a_mask.png", a_box(64, 64))
    (tmp_path / "a.txt").write_text("go")
    assert tasks(tmp_path) == {"a": "go"}


def test_sub_folders_are_read_and_their_ids_are_paths(tmp_path: Path) -> None:
    a_row(tmp_path, "p0", 0)
    a_row(tmp_path / "more", "p0", 1)
    a_row(tmp_path / "more/deep", "p1", 2, text=None)
    (tmp_path / "instructions.csv").write_text("name;instruction\nmore/deep/p1;paint it\n")
    assert tasks(tmp_path) == {"p0": "go", "more/p0": "go", "more/deep/p1": "paint it"}


def test_masks_may_mirror_sub_folders_or_lie_in_a_folder_that_they_share(tmp_path: Path) -> None:
    for seed, name in enumerate(("images/cats/p0", "images/dogs/p0", "images/dogs/p1")):
        saved(tmp_path / f"{name}.png", an_image(24, 30, seed=seed))
        (tmp_path / f"{name}.txt").write_text(name)
    saved(tmp_path / "masks/cats/p0.png", a_box(24, 30))
    saved(tmp_path / "masks/dogs/p0.png", a_box(24, 30))
    saved(tmp_path / "Masks/p1.png", a_box(24, 30))
    assert {*tasks(tmp_path)} == {"cats/p0", "dogs/p0", "dogs/p1"}


def test_a_shared_mask_of_two_images_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("cats/p0", "dogs/p0")):
        saved(tmp_path / f"{name}.png", an_image(24, 30, seed=seed))
        (tmp_path / f"{name}.txt").write_text("go")
    saved(tmp_path / "masks/p0.png", a_box(24, 30))
    with pytest.raises(
        InputError, match=r"another image of that name could have the mask masks/p0"
    ):
        opened(tmp_path)


def test_a_mask_of_the_folder_above_is_not_lent_to_an_image_of_its_name(tmp_path: Path) -> None:
    saved(tmp_path / "p0.png", an_image(24, 30))
    saved(tmp_path / "masks/p0.png", a_box(24, 30))
    (tmp_path / "p0.txt").write_text("go")
    saved(tmp_path / "more/p0.png", an_image(24, 30, seed=1))
    (tmp_path / "more/p0.txt").write_text("go")
    with pytest.raises(InputError, match=r"1 problem in 2 rows.*more/p0.png: has no mask"):
        opened(tmp_path)


def test_folders_of_several_splits_are_not_mixed(tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "val", "test")):
        a_row(tmp_path / name, "p0", seed)
    with pytest.raises(InputError, match=r"several splits \(test/, train/, val/\).*heldout_path="):
        opened(tmp_path)


def test_parts_without_their_image_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    saved(tmp_path / "masks/p7.png", a_box(8, 8))
    saved(tmp_path / "images/p9_target.png", a_box(8, 8))
    (tmp_path / "images/p7.txt").write_text("go")
    found = notices(tmp_path)
    assert str(found["masks-without-image"]) == (
        "1 mask is not used: no image of its name is here (first: masks/p7.png)"
    )
    assert found["targets-without-image"].examples == ("images/p9_target.png",)
    assert found["texts-without-image"].examples == ("images/p7.txt",)
    with pytest.raises(InputError, match=r"1 mask is not used.*data.strict"):
        opened(tmp_path, strict=True)


def test_dead_links_and_unrelated_files_are_counted_and_hidden_ones_are_not(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path)
    os.symlink("../blobs/3f2a", tmp_path / "p8.jpg")
    (tmp_path / "p8.txt").write_text("go")
    saved(tmp_path / "preview.png", an_image(8, 8))
    (tmp_path / "prompts.csv").write_text("a,b\n")
    for name in ("Thumbs.db", ".DS_Store", "._p0.png", "README.md", "__MACOSX/p0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = notices(tmp_path)
    assert "1 of 6 images is not used: a link whose file does not exist" in str(found["dead-links"])
    assert found["dead-links"].examples == ("p8.jpg",)
    assert found["bare-images"].examples == ("preview.png",)
    assert found["other-files"].examples == ("prompts.csv",)
    assert {*found} == {"dead-links", "bare-images", "other-files", "few-held-out"}


def test_images_beside_a_folder_of_sources_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    saved(tmp_path / "cover.png", an_image(8, 8))
    saved(tmp_path / "edited/p0.png", an_image(8, 8))
    found = notices(tmp_path)["images-outside"]
    assert (found.count, found.examples) == (2, ("cover.png", "edited/p0.png"))


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    write_folder(tmp_path)
    os.symlink(tmp_path, tmp_path / "again")
    assert len(tasks(tmp_path)) == 4


TABLES = {
    "instructions.csv": "name,instruction\np0,first\np0,second\np1.png,third\n",
    "instructions.tsv": "name\tinstruction\np0\tfirst\np0\tsecond\np1.png\tthird\n",
    "Instructions.CSV": "\ufeffsep=;\r\nFile Name; Instruction \r\n"
    "p0;first\r\np0;second\r\np1;third",
    "instructions.json": '{"p0": ["first", "second"], "p1.png": "third"}',
    "instructions.jsonl": '{"image": "p0", "prompt": "first"}\n'
    '{"image": "p0", "prompt": "second"}\n'
    '{"image": "p1", "prompt": "third"}\n',
}


@pytest.mark.parametrize("name", list(TABLES))
def test_several_instructions_of_one_image_become_several_tasks(tmp_path: Path, name: str) -> None:
    a_row(tmp_path, "p0", 0, text=None)
    a_row(tmp_path, "p1", 1, text=None)
    (tmp_path / name).write_text(TABLES[name], newline="")
    assert tasks(tmp_path) == {"p0": "first", "p0#2": "second", "p1": "third"}
    sides = [{*_ids(opened(tmp_path, split))} for split in ("train", "heldout")]
    assert {"p0", "p0#2"} in sides


def _ids(dataset: Dataset) -> list[str]:
    return [dataset[index].task_id for index in range(len(dataset))]


def test_an_array_of_objects_is_a_table_too(tmp_path: Path) -> None:
    a_row(tmp_path, "p0", 0, text=None)
    content = [{"file": "p0.png", "edit": "first"}, {"file": "p0.png", "edit": "first"}]
    (tmp_path / "instructions.json").write_text(json.dumps(content))
    assert tasks(tmp_path) == {"p0": "first"}
    assert notices(tmp_path)["repeated-instructions"].examples == ("p0.png",)


def test_a_table_that_names_absent_images_or_differs_from_a_text_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "instructions.csv").write_text("name,instruction\np0,other words\np6,go\np7,go\n")
    (tmp_path / "instructions.json").write_text('{"p1": "edit number 1", "p2": "new", "p9": "x"}')
    found = notices(tmp_path)
    assert found["text-beside-table"].examples == ("p2.png",)
    assert found["entries-without-image"].examples == ("p9 in instructions.json",)
    assert found["tables-not-read"].examples == ("instructions.csv",)
    assert tasks(tmp_path)["p2"] == "edit number 2"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (None, {"p0": "remove it", "p0#2": "paint it blue", "p1": "go"}),
        ("split", {"p0": "remove it", "p0#2": "paint it blue", "p1": "go"}),
        ("join", {"p0": "remove it paint it blue", "p1": "go"}),
    ],
)
def test_lines_of_a_text_are_instructions_of_their_own_unless_they_are_joined(
    tmp_path: Path, lines: Any, expected: dict[str, str]
) -> None:
    a_row(tmp_path, "p0", 0, text="remove it\n\n  paint it\tblue \r\n")
    a_row(tmp_path, "p1", 1)
    assert tasks(tmp_path, text_lines=lines) == expected
    assert ("several-lines" in notices(tmp_path, text_lines=lines)) == (lines is None)


def test_a_comma_without_quotes_does_not_cut_an_instruction(tmp_path: Path) -> None:
    a_row(tmp_path, "p0", 0, text=None)
    (tmp_path / "instructions.csv").write_text("name,instruction\np0,remove it, then paint\n")
    with pytest.raises(InputError, match=r"line 2 has 3 cells for 2 columns.*in quotes"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["instructions.csv", "p0.txt"])
def test_another_encoding_is_named_with_what_it_would_read(tmp_path: Path, name: str) -> None:
    a_row(tmp_path, "p0", 0, text=None)
    text = "name,instruction\np0,un café\n" if name.endswith("csv") else "un café"
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    with pytest.raises(InputError, match=r"byte 0xe9; as Windows-1252 .*un café'.*CSV UTF-8"):
        opened(tmp_path)
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    assert tasks(tmp_path) == {"p0": "un café"}


def test_accents_of_a_mac_are_the_same_name(tmp_path: Path) -> None:
    name = "café"
    a_row(tmp_path, unicodedata.normalize("NFD", name), 0, text=None)
    (tmp_path / f"{unicodedata.normalize('NFC', name)}.txt").write_text("go")
    assert [*tasks(tmp_path).values()] == ["go"]
    rows = {"source": f"{name}.png", "instruction": "go", "mask": f"{name}_mask.png"}
    assert [*tasks(write_lines(tmp_path, rows)).values()] == ["go"]


def test_backslashes_home_and_file_addresses_name_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for index in range(3):
        a_row(tmp_path / "photos", f"p {index}", index)
    sources = ["photos\\p 0", "~/photos/p 1", f"file://{tmp_path}/photos/p%202"]
    rows = (
        {"source": f"{source}.png", "instruction": "go", "mask": f"{source}_mask.png"}
        for source in sources
    )
    found = notices(write_lines(tmp_path, *rows))
    assert "2 paths with backslashes" in str(found["backslash-paths"])
    assert len(tasks(Path("~/rows.jsonl"))) == 3
    address = DataConfig(path=f"file://{tmp_path}/photos")
    assert open_dataset(address, "train").notices == opened(tmp_path / "photos").notices


def test_a_web_address_in_a_row_is_refused_as_such(tmp_path: Path) -> None:
    row = {"source": "https://x.org/a.png", "instruction": "go", "mask": "m.png"}
    with pytest.raises(InputError, match=r"line 1: 'source' is a web address .*download"):
        opened(write_lines(tmp_path, row))


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "metadata.csv", "lines.json"])
def test_rows_may_be_an_array_or_cells(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    rows = [
        {"Image": f"p{i}.png", "edit instruction": f"go {i}", "mask": f"p{i}_mask.png"}
        for i in range(3)
    ]
    if name == "rows.json":
        text = json.dumps(rows, indent=1)
    elif name == "lines.json":
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "\n".join(";".join(cells) for cells in [rows[0].keys(), *(r.values() for r in rows)])
    (tmp_path / name).write_text(text)
    path = tmp_path if name.startswith("metadata") else tmp_path / name
    assert tasks(path) == {f"p{i}": f"go {i}" for i in range(3)}
    assert "read as 'instruction'" in str(notices(path)["other-key-names"])


def test_files_that_no_row_of_the_folder_names_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path)
    row = {"source": "p0.png", "instruction": "go", "mask": "p0_mask.png"}
    write_lines(tmp_path, row).rename(tmp_path / "metadata.jsonl")
    assert notices(tmp_path)["files-in-no-row"].count == 3 * 4 - 2


def test_all_problems_stand_in_a_file_that_the_message_names(tmp_path: Path) -> None:
    rows = [{"source": f"gone{i}.png", "instruction": "x", "mask": "m.png"} for i in range(500)]
    with pytest.raises(
        InputError, match=r"500 problems in 500 rows.*and 495 more, all in "
    ) as seen:
        opened(write_lines(tmp_path, *rows))
    path = Path(str(seen.value).rsplit("all in ", 1)[1])
    lines = path.read_text().splitlines()
    path.unlink()
    assert len(lines) == 500 and "gone499.png" in lines[-1]


def test_a_missing_file_with_another_case_or_ending_is_pointed_out(tmp_path: Path) -> None:
    write_folder(tmp_path)
    row = {"source": "P0.JPG", "instruction": "x", "mask": "p0_mask.png"}
    with pytest.raises(InputError, match=r"P0.JPG not found, but there is p0.png"):
        opened(write_lines(tmp_path, row))


@pytest.mark.parametrize("twin", ["copy", "png", "jpg"])
def test_equal_images_are_on_one_side_whatever_their_names_and_kinds(
    tmp_path: Path, twin: str
) -> None:
    suffix = "png" if twin == "copy" else "jpg"
    for index in range(12):
        noise = np.kron(an_image(25, 32, seed=index), np.ones((8, 8, 1), dtype=np.uint8))
        first = saved(tmp_path / f"a{index}.{suffix}", noise)
        second = tmp_path / f"b{index}.{'png' if twin != 'jpg' else 'jpg'}"
        if twin == "png":
            Image.open(first).save(second)
        else:
            shutil.copyfile(first, second)
        for name in ("a", "b"):
            saved(tmp_path / f"{name}{index}_mask.png", a_box(200, 256))
            (tmp_path / f"{name}{index}.txt").write_text("go")
    sides = [
        {task[1:] for task in _ids(opened(tmp_path, split, heldout_fraction=0.4))}
        for split in ("train", "heldout")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    found = notices(tmp_path)["equal-images"]
    assert found.count == 12 and "24 paths show only 12 different images" in found.message


def test_three_spellings_of_one_path_are_one_image(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", num_rows=8)
    spellings = ("photos/p{}.png", "./photos/p{}.png", "photos/../photos/p{}.png")
    rows = (
        {
            "source": spelling.format(index),
            "instruction": "go",
            "mask": f"photos/p{index}_mask.png",
            "id": f"{index}-{number}",
        }
        for index in range(8)
        for number, spelling in enumerate(spellings)
    )
    path = write_lines(tmp_path, *rows)
    sides = [
        {task[0] for task in _ids(opened(path, split, heldout_fraction=0.4))}
        for split in ("train", "heldout")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_twin_moves_no_other_image(tmp_path: Path) -> None:
    write_folder(tmp_path, num_rows=20, height=24, width=30)
    before = {*_ids(opened(tmp_path, "heldout", heldout_fraction=0.3))}
    for kind in (".png", "_mask.png", ".txt"):
        shutil.copyfile(tmp_path / f"p3{kind}", tmp_path / f"twin{kind}")
    after = {*_ids(opened(tmp_path, "heldout", heldout_fraction=0.3))}
    assert before <= after <= before | {"p3", "twin"}


def test_a_heldout_path_that_shares_images_with_training_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", num_rows=3)
    write_folder(tmp_path / "b", num_rows=2)
    found = notices(tmp_path / "a", heldout_path=str(tmp_path / "b"))["images-in-both-splits"]
    assert "2 of 2 held-out images are also trained on" in found.message


def test_the_sizes_of_a_small_split_are_said(tmp_path: Path) -> None:
    write_folder(tmp_path, num_rows=14, height=24, width=30)
    notice = notices(tmp_path)["few-held-out"]
    heldout = len(opened(tmp_path, "heldout"))
    assert f"{14 - heldout} images train, {heldout} " in notice.message
    assert "data.heldout_fraction=0.1" in notice.message
    assert "few-held-out" not in notices(tmp_path, heldout_fraction=0.6)


def test_a_name_that_is_no_utf8_is_counted(tmp_path: Path) -> None:
    write_folder(tmp_path)
    folder = os.fsencode(tmp_path)
    for kind in (b".png", b"_mask.png", b".txt"):
        shutil.copyfile(folder + b"/p0" + kind, folder + b"/caf\xe9" + kind)
    notice = notices(tmp_path)["unreadable-kinds"]
    assert "1 of 5 images is not used: its name is no UTF-8" in notice.message
    assert notice.examples == ("caf\\udce9.png",) and len(tasks(tmp_path)) == 4


@pytest.mark.parametrize("character", ["\\udce9", "\\u0000"])
def test_half_a_character_in_a_row_is_refused(tmp_path: Path, character: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"source": "a{character}.png", "instruction": "x", "mask": "m.png"}}')
    with pytest.raises(InputError, match="'source' holds a character that is none"):
        opened(path)


def test_an_empty_text_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "p1.txt").write_text(" \n\n")
    with pytest.raises(InputError, match=r"p1.png: has no instruction \(p1.txt is empty"):
        opened(tmp_path)


def test_the_ending_of_a_mask_is_read_in_any_case(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for index in range(4):
        name = f"p{index}_Mask.PNG" if index % 2 else f"p{index}_MASK.png"
        (tmp_path / f"p{index}_mask.png").rename(tmp_path / name)
    assert set(tasks(tmp_path)) == {"p0", "p1", "p2", "p3"}


@pytest.mark.parametrize("name", ["p0-mask.png", "mask_p0.png", "p0_m.png", "p0.png_mask.png"])
def test_a_mask_of_another_usual_name_is_named_beside_the_image_that_lacks_one(
    name: str, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    (tmp_path / "p0_mask.png").rename(tmp_path / name)
    with pytest.raises(InputError, match=rf"p0.png: has no mask .*; rename {name} if it is"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["go".encode("utf-16-le"), "go".encode("utf-32-le"), b"{\\rtf1 go}", b"PK\x03\x04\0\0"],
)
def test_a_text_of_another_program_is_refused_rather_than_read_as_letters(
    content: bytes, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    (tmp_path / "p0.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"p0.txt is no plain text: it "):
        opened(tmp_path)


def test_a_text_in_utf_32_is_read_by_its_mark(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "p0.txt").write_bytes("größer".encode("utf-32"))
    assert tasks(tmp_path)["p0"] == "größer"


def test_a_text_of_marks_without_width_is_no_instruction(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "p0.txt").write_text("\u200b \ufeff\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"has no instruction \(p0.txt is empty"):
        opened(tmp_path)


def test_a_cell_whose_quotation_mark_is_open_swallows_no_rows(tmp_path: Path) -> None:
    write_folder(tmp_path)
    rows = [f'p{i}.png,p{i}_mask.png,make it 5" big' for i in range(4)]
    file = tmp_path / "metadata.csv"
    file.write_text("\n".join(["source,mask,instruction", *rows]))
    assert tasks(tmp_path)["p1"] == 'make it 5" big'
    assert not any("metadata.csv" in str(notice) for notice in notices(tmp_path).values())
    rows[1] = 'p1.png,p1_mask.png,"make it big'
    file.write_text("\n".join(["source,mask,instruction", *rows]))
    with pytest.raises(InputError, match=r"not closed .* begins in line 3"):
        opened(tmp_path)


def test_magicbrush_names_of_columns_are_read_and_said(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_lines(
        tmp_path,
        *(
            {
                "source_img": f"p{i}.png",
                "mask_img": f"p{i}_mask.png",
                "target_img": f"p{i}.png",
                "instruction": "go",
            }
            for i in range(4)
        ),
    )
    dataset = opened(tmp_path / "rows.jsonl")
    assert "target" in dataset.fields
    assert sum(notice.kind == "other-key-names" for notice in dataset.notices) == 3
