"""``rl-edit dataset check`` shows what training would make of data; --strict makes it an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_files import a_box, saved, write_folder, write_lines
from runs import command


def test_a_good_folder_is_shown_with_its_split_notices_and_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data", num_rows=6)
    saved(tmp_path / "data/lost_mask.png", a_box(8, 8))
    out = tmp_path / "out"
    code, text, err = command(
        monkeypatch, capsys, "dataset", "check", tmp_path / "data", "--out", out
    )
    assert (code, list(err)) == (0, [])
    assert "train: 5 rows of 5 images" in text and "held out: 1 row of 1 image" in text
    assert "note (masks-without-image, 1): 1 mask is not used" in text
    assert "53x37" in text and "edit number 0" in text
    assert (out / "problems.txt").read_text().startswith("note: 1 mask is not used")
    assert (out / "masks.png").is_file()


def test_strict_shows_the_notices_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, num_rows=6)
    code, text, err = command(monkeypatch, capsys, "dataset", "check", tmp_path, "--strict")
    assert code == 2 and "note (few-held-out, 1)" in text
    (line,) = err
    assert "5 images train, 1 is held out" in line and "because of data.strict" in line


def test_all_problems_are_printed_and_written_in_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ({"source": f"{i}.png", "instruction": "x", "mask": "m.png"} for i in range(12))
    path = write_lines(tmp_path, *rows)
    code, text, err = command(
        monkeypatch, capsys, "dataset", "check", path, "--out", tmp_path / "out"
    )
    assert code == 2 and len(err) == 1
    places = [f"rows.jsonl line {number}:" for number in range(1, 13)]
    for lines in (text.splitlines(), (tmp_path / "out/problems.txt").read_text().splitlines()):
        assert [place for place, line in zip(places, lines, strict=True) if place in line] == places


def test_with_a_preset_masks_are_checked_on_its_canvas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, num_rows=2, height=64, width=64)
    spots = a_box(64, 64) * 0
    spots[::4, ::4] = 255
    saved(tmp_path / "p0_mask.png", spots)
    assert command(monkeypatch, capsys, "dataset", "check", tmp_path)[0] == 0
    code, _, (line,) = command(
        monkeypatch, capsys, "dataset", "check", tmp_path, "--preset", "tiny-rc-grpo"
    )
    assert code == 2 and "touches every 8 px token" in line


@pytest.mark.parametrize("verb", ["train", "audit-reward", "bench-reward"])
def test_strict_refuses_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    write_folder(tmp_path / "data", num_rows=3)
    monkeypatch.chdir(tmp_path)
    data = f"data.path={tmp_path / 'data'}"
    code, _, err = command(monkeypatch, capsys, verb, "--preset", "tiny-rc-grpo", data, "--strict")
    assert code == 2 and "2 images train, 1 is held out" in err[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
