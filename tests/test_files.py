"""``rl_edit.files``: what stays of a file that is replaced, and of one that is none."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from rl_edit.errors import InputError
from rl_edit.files import replace_file, write_result


def test_several_writers_of_one_file_leave_one_content_and_no_remainder(tmp_path: Path) -> None:
    file = tmp_path / "record.json"

    def write(letter: str) -> None:
        for _ in range(50):
            replace_file(file, letter * 10_000)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "xyz"]
    for writer in writers:
        writer.start()
    torn = 0
    while any(writer.is_alive() for writer in writers):
        if file.exists():
            text = file.read_text()
            torn += len(text) != 10_000 or len(set(text)) != 1
    assert torn == 0 and list(tmp_path.iterdir()) == [file]


def test_a_result_goes_into_a_pipe_or_a_device_and_never_in_its_place(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_result(pipe, "a page")
    assert os.read(reader, 100) == b"a page" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_a_result_cannot_take_the_place_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        write_result(tmp_path, "a page")
    assert list(tmp_path.iterdir()) == []
