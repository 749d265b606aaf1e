"""``rl-edit edit``: edits one image by one instruction, with or without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from rl_edit.data.canvas import fit
from rl_edit.data.editor_text import text_notices
from rl_edit.data.images import read_rgb
from rl_edit.editors import (
    BUILTIN,
    Editor,
    EditorFamily,
    editor_config,
    inspect_editor,
    load_editor,
    lora,
    read_adapter,
    require_adapter,
)
from rl_edit.errors import InputError
from rl_edit.method.exploration import NoiseSource
from rl_edit.method.rollout import denoise
from rl_edit.types import EditTask


def edit_command(
    image: Annotated[
        Path,
        typer.Argument(
            help="Image to edit. It is fitted to the editor's canvas, with its aspect ratio."
        ),
    ],
    instruction: Annotated[str, typer.Option(help="What to change.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter, e.g. RUN/adapter. Default: the base editor.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: NAME_edited.png in this directory."),
    ] = None,
    editor: Annotated[
        str, typer.Option(help="Editor. Default: that of the adapter's run, else the built-in one.")
    ] = "",
    resolution: Annotated[int | None, typer.Option(help="Canvas side in pixels.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps. Default: the editor's (built-in: 12).", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise seed.")] = 0,
) -> None:
    """Edit one image."""
    if not instruction.strip():
        raise InputError("--instruction is empty: say what to change, e.g. 'remove the red circle'")
    if not image.is_file():
        raise InputError(f"no image at {image}: give an existing image file")
    source = torch.from_numpy(read_rgb(image, where=str(image)).copy())
    config = _editor_config(editor, adapter, resolution)
    target = output or Path(f"{image.stem}_edited.png")
    # Everything that can be refused is refused before the editor is loaded.
    _require_writable(target)
    console = Console()
    notes = [*inspect_editor(config).notes, *_notes(config, source, instruction)]
    stored = read_adapter(config, adapter) if adapter is not None else None
    if stored is not None:
        notes += stored[1].notes
        require_adapter(config, stored[0])
    for note in notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    loaded = load_editor(config)
    if stored is not None:
        lora.attach(loaded.transformer, stored[1], seed=0)
        lora.load(loaded.transformer, stored[0])
    task = fit(
        _task(image.name, source, instruction),
        resolution=config.resolution,
        multiple=loaded.pixels_per_token,
    )
    Image.fromarray(
        _edited(loaded, task, steps=steps or config.edit_steps, seed=seed).numpy()
    ).save(target)
    height, width = task.source.shape[:2]
    console.print(
        f"{target} ({width}x{height}, from {source.shape[1]}x{source.shape[0]})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _notes(config: EditorFamily, source: Tensor, instruction: str) -> list[str]:
    """Says what the editor cannot do with this image or instruction."""
    height, width = source.shape[:2]
    misfit = config.misfit(height, width)
    notes = [misfit] if misfit else []
    readings = config.read_text([instruction])
    if readings is not None:
        notices = text_notices(["--instruction"], readings, editor=config.path)
        notes += [str(notice) for notice in notices]
    return notes


def _require_writable(target: Path) -> None:
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"cannot write {target}: use a .png, .jpg or .webp name")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: {target.parent} is not a directory")


def _task(name: str, source: Tensor, instruction: str) -> EditTask:
    """Makes a task of an image that came without a mask."""
    # A task needs a mask that is neither empty nor full. Without a reward nothing reads it.
    mask = torch.zeros(source.shape[:2], dtype=torch.bool)
    mask[0, 0] = True
    return EditTask(
        task_id=name, task_type="edit", source=source, instruction=instruction, edit_mask=mask
    )


def _edited(editor: Editor, task: EditTask, *, steps: int, seed: int) -> Tensor:
    """Returns the edit of a task on its canvas, from the noise of ``seed``."""
    conditioning = editor.encode(task)
    # Keyed: the same seed gives the same edit, on any machine that rounds alike.
    noise = NoiseSource(seed, "edit", 0).normal("edit", 0, editor.latent_shape(conditioning))
    final = denoise(
        lambda latents, sigma: editor.velocity(latents, sigma, conditioning),
        noise[None],
        editor.sigmas(steps, conditioning),
    ).final
    return editor.decode(final, conditioning)[0]


def _editor_config(editor: str, adapter: Path | None, resolution: int | None) -> EditorFamily:
    """Returns the named editor, else the run's when the adapter lies in a run directory."""
    from rl_edit.config import load_config

    config = editor_config({"path": editor or BUILTIN})
    if adapter is not None and not editor:
        # RUN/adapter and RUN/adapter/FILE both belong to RUN.
        run = (adapter if adapter.is_dir() else adapter.parent).parent
        if (run / "config.yaml").is_file():
            config = load_config(run / "config.yaml").editor
    # Nothing reads attention here, so none is recorded.
    changes: dict[str, Any] = {"attention_layers": 0}
    if resolution:
        changes["resolution"] = resolution
    return editor_config({**config.model_dump(), **changes})
