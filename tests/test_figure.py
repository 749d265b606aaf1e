"""The figure of a run: its rows, its size, and runs that cannot have one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from report_runs import write_json, write_run
from rl_edit.cli.report import report_command
from rl_edit.errors import InputError
from rl_edit.report import write_figure
from rl_edit.report.figure import FOOT, GAP, HEAD, MARGIN, PANEL, draw_figure


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny-rc-grpo-seed1")


def report_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(report_command)
    return app


def test_the_figure_has_a_row_for_each_kind_of_edit_and_is_a_small_png(
    run_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "images" / "figure.png"
    result = CliRunner().invoke(report_app(), [str(run_dir), "--figure", str(path)])
    assert result.exit_code == 0
    assert result.output.split() == [str(run_dir / "report.html"), str(path)]
    with Image.open(path) as figure:
        assert figure.format == "PNG"
        assert figure.width == 1600
        assert figure.height == 2 * (HEAD + 4 * (PANEL + GAP) + FOOT)
    assert path.stat().st_size < 200_000


def test_the_figure_shows_the_first_example_of_each_kind_without_blur(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=2, examples=7)
    left, top, side = 800 - MARGIN - PANEL, HEAD, 2 * PANEL
    figure = np.asarray(draw_figure(run))
    for row in range(5):  # the sixth and seventh example are of the first two kinds again
        place = np.s_[2 * (top + row * (PANEL + GAP)) :, 2 * (left - 4 * (PANEL + GAP)) :]
        drawn = figure[place][:side, :side]
        source = np.asarray(Image.open(run / f"evaluation/images/shapes-{row:04d}/source.png"))
        assert (drawn == source.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_the_figure_does_without_target_attention_metrics_and_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=2, examples=2)
    (run / "evaluation.json").unlink()
    for name in ("target", "attention_base", "attention_trained"):
        (run / "evaluation" / "images" / "shapes-0000" / f"{name}.png").unlink()
    write_json(
        run / "evaluation" / "images" / "shapes-0000" / "task.json",
        {"task_type": "add", "instruction": "a very long instruction " * 9},
    )
    assert write_figure(run, tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("examples", "name", "words"),
    [
        (0, "figure.png", "has no evaluated examples"),
        (1, "figure.jpg", "no PNG"),
        (1, "run.json/figure.png", "cannot write"),
    ],
)
def test_a_figure_that_cannot_be_made_is_an_input_error(
    tmp_path: Path, examples: int, name: str, words: str
) -> None:
    run = write_run(tmp_path, updates=2, examples=examples)
    with pytest.raises(InputError, match=words):
        write_figure(run, tmp_path / name)
    assert not (tmp_path / name).exists()
