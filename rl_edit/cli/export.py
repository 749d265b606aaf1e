"""``rl-edit export``: writes a run's adapter for other programs, and compares it there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from rl_edit.config import RunConfig, load_config
from rl_edit.editors import editor_config, load_editor, read_adapter
from rl_edit.editors.adapter_export import acts_alike, largest_difference, write_adapter
from rl_edit.errors import InputError
from rl_edit.files import new_directory
from rl_edit.report.adapter_card import adapter_card
from rl_edit.report.run_files import read_run
from rl_edit.run_directory import CONFIG_FILE, holds_run, no_run_at


def export_command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="A new directory for the adapter and its card.")],
    form: Annotated[
        Literal["diffusers", "comfyui", "peft"],
        typer.Option("--format", help="Program that reads it. comfyui: the scale is folded in."),
    ] = "diffusers",
    check: Annotated[
        bool, typer.Option(help="Read it again and compare a test image; loads the editor.")
    ] = True,
) -> None:
    """Write a run's adapter for diffusers, ComfyUI or PEFT, with a model card."""
    if not holds_run(run):
        raise InputError(no_run_at(run))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already: give a new or an empty directory")
    config = load_config(run / CONFIG_FILE)
    # Read before anything is written, so that a damaged run leaves nothing.
    files = read_run(run)
    trained = read_adapter(config.editor, run / "adapter")
    try:
        with new_directory(out) as partial:
            file = write_adapter(partial, *trained, form=form, base=config.editor.path)
            # Always, also without an image: it needs no editor.
            if not acts_alike(trained, read_adapter(config.editor, file)):
                raise InputError(
                    f"the adapter written for {form} does not act as the run's, so it was not "
                    "kept: export it as diffusers"
                )
            difference = _difference(config, run, file) if check else None
            card = adapter_card(
                files,
                config,
                adapter=str(trained[0].id),
                file=file,
                difference=difference,
            )
            (partial / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {out} ({error.strerror}): give a directory that can be written"
        ) from error
    compared = (
        "" if difference is None else f", differs by at most {difference} of 255 on a test image"
    )
    Console().print(
        f"{out / file.name} (for {form}{compared}); its README.md is the model card",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _difference(config: RunConfig, run: Path, file: Path) -> int:
    """Returns the largest difference of an image between the run's adapter and the written one."""
    # Nothing reads attention here, so none is recorded.
    settings = editor_config({**config.editor.model_dump(), "attention_layers": 0})
    trained, exported = (read_adapter(settings, place) for place in (run / "adapter", file))
    return largest_difference(load_editor(settings), trained, exported)
