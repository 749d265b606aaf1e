"""``rl-edit edit``: edits images by an instruction, with the base editor or with adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor

from rl_edit.cli.edit_files import (
    BASE,
    SOURCE,
    STRIP,
    Source,
    Targets,
    adapter_names,
    find_sources,
    strip,
    write_image,
)
from rl_edit.data.canvas import canvas_size, task_without_mask
from rl_edit.data.editor_text import text_notices
from rl_edit.data.images import read_rgb
from rl_edit.data.notices import Notice
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
from rl_edit.editors.editing import edited
from rl_edit.errors import InputError
from rl_edit.method.exploration import NoiseSource
from rl_edit.types import EditTask


def edit_command(
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Images to edit, or folders of them. Each is fitted to the editor's canvas, with "
            "its aspect ratio. No mask is needed."
        ),
    ],
    instruction: Annotated[str, typer.Option(help="What to change, in every image.")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="Adapter, e.g. RUN/adapter. Several are compared: from the same noise, each makes "
            "its own image. Default: the base editor."
        ),
    ] = None,
    adapter_scale: Annotated[
        float, typer.Option(help="Strength of the adapters: 1 as trained, 0 the base editor.")
    ] = 1.0,
    base: Annotated[bool, typer.Option(help="Beside adapters, edit by the base too.")] = False,
    side_by_side: Annotated[
        bool, typer.Option("--strip", help="Also write each source and its edits side by side.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File of a single result, folder of several. Default: NAME_edited.png in this "
            "directory; for several the folder edited."
        ),
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
    """Edit images."""
    adapters = adapter or []
    if not instruction.strip():
        raise InputError("--instruction is empty: say what to change, e.g. 'remove the red circle'")
    if not adapters and (adapter_scale != 1 or base):
        option = "--base" if base else f"--adapter-scale {adapter_scale:g}"
        raise InputError(f"{option} is about adapters: add --adapter RUN/adapter")
    config = _editor_config(editor, adapters, resolution)
    sources, notices = find_sources(images)
    by_name = dict(zip(adapter_names(adapters), adapters, strict=True))
    variants = [*([BASE] if base or not adapters else []), *by_name]
    work = _Work(
        config=config,
        instruction=instruction,
        targets=Targets.of(sources, variants, output, strip=side_by_side),
        adapters=by_name,
        steps=steps or config.edit_steps,
        seed=seed,
        strip=side_by_side,
    )
    _edit(work, sources, notices, scale=adapter_scale)


def _edit(
    work: _Work,
    sources: Sequence[Source],
    notices: Sequence[Notice],
    *,
    scale: float,
) -> None:
    """Checks what is left to check, loads the editor, and edits batch after batch."""
    config, console = work.config, Console()

    def show(line: object) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    # Everything that can be refused is refused before the editor is loaded.
    notes = [*inspect_editor(config).notes, *map(str, notices)]
    notes += _notes(config, sources, work.instruction)
    stored = {name: read_adapter(config, place) for name, place in work.adapters.items()}
    for weights, settings in stored.values():
        notes += settings.notes
        require_adapter(config, weights)
    for note in notes:
        show(f"note: {note}")
    editor = load_editor(config)
    for name, (weights, settings) in stored.items():
        _attach(editor, name, weights, settings, scale=scale)
    done = 0
    for batch in work.batches(editor, sources):
        for line in work.edit(editor, batch):
            show(line)
        done += len(batch)
        # Progress; one batch alone needs none.
        if len(sources) > len(batch):
            show(f"{done} of {len(sources)} images")


def _notes(config: EditorFamily, sources: Sequence[Source], instruction: str) -> list[str]:
    """Says what the editor cannot do with these images or this instruction."""
    notes = list(dict.fromkeys(filter(None, (config.misfit(*source.size) for source in sources))))
    if len(notes) > 1:
        notes = [f"{notes[0]} Images of {len(notes) - 1} other sizes are like it."]
    readings = config.read_text([instruction])
    if readings is not None:
        notices = text_notices(["--instruction"], readings, editor=config.path)
        notes += [str(notice) for notice in notices]
    return notes


def _attach(editor: Editor, name: str, weights: Any, settings: Any, *, scale: float) -> None:
    """Adds an adapter beside the others."""
    # PEFT makes it a part of module names, where a dot would split it.
    inner = _inner(name)
    lora.attach(editor.transformer, settings, seed=0, adapter_name=inner)
    lora.load(editor.transformer, weights, adapter_name=inner)
    lora.strengthen(editor.transformer, scale, adapter_name=inner)


def _inner(name: str) -> str:
    return f"edit_{name.encode().hex()}"


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Makes the edits of a command, all by the same settings."""

    config: EditorFamily
    instruction: str
    targets: Targets
    adapters: Mapping[str, Path]
    steps: int
    seed: int
    strip: bool

    def batches(self, editor: Editor, sources: Sequence[Source]) -> Iterator[list[Source]]:
        """Yields images of one canvas together, at most ``micro_batch`` at a time."""
        # In the order of their first image; one forward takes one canvas only.
        by_canvas: dict[tuple[int, int], list[Source]] = {}
        for source in sources:
            by_canvas.setdefault(self._canvas(editor, source), []).append(source)
        for group in by_canvas.values():
            for start in range(0, len(group), self.config.micro_batch):
                yield group[start : start + self.config.micro_batch]

    def edit(self, editor: Editor, batch: Sequence[Source]) -> Iterator[str]:
        """Edits images of one canvas by every variant; yields a line for each file written."""
        tasks = [self._task(editor, source) for source in batch]
        edits: list[list[tuple[str, Image.Image]]] = [[] for _ in batch]
        # Variants inside a batch: an image is read once, and switching adapters costs nothing.
        for variant in self.targets.variants:
            pixels = self._edited(editor, tasks, variant)
            for source, task, result, of_source in zip(batch, tasks, pixels, edits, strict=True):
                image = Image.fromarray(result.numpy())
                of_source.append((variant, image))
                path = self.targets.path(source, variant)
                write_image(path, image)
                yield _line(path, task, source)
        if self.strip:
            for source, task, of_source in zip(batch, tasks, edits, strict=True):
                path = self.targets.path(source, STRIP)
                first = (SOURCE, Image.fromarray(task.source.numpy()))
                write_image(path, strip([first, *of_source]))
                yield str(path)

    def _task(self, editor: Editor, source: Source) -> EditTask:
        pixels = torch.from_numpy(read_rgb(source.path, where=str(source.path)).copy())
        return task_without_mask(
            pixels,
            self.instruction,
            task_id=source.path.name,
            resolution=self.config.resolution,
            multiple=editor.pixels_per_token,
        )

    def _canvas(self, editor: Editor, source: Source) -> tuple[int, int]:
        return canvas_size(*source.size, self.config.resolution, editor.pixels_per_token)

    def _edited(self, editor: Editor, tasks: Sequence[EditTask], variant: str) -> Tensor:
        """Returns the edits ``[batch, height, width, 3]``, from the noise of the seed."""
        if self.adapters:
            lora.set_active(
                editor.transformer, variant in self.adapters, adapter_name=_inner(variant)
            )
        # Keyed by the seed alone, so it is the same on any machine that rounds alike.
        noise = NoiseSource(self.seed, "edit", 0)
        return edited(editor, tasks, num_steps=self.steps, noise=noise)


def _line(path: Path, task: EditTask, source: Source) -> str:
    (height, width), (from_height, from_width) = task.source.shape[:2], source.size
    return f"{path} ({width}x{height}, from {from_width}x{from_height})"


def _editor_config(editor: str, adapters: Sequence[Path], resolution: int | None) -> EditorFamily:
    """Returns the named editor, else that of the runs in which the adapters lie.

    Raises:
        InputError: they are of runs on different editors.
    """
    from rl_edit.config import load_config

    config = editor_config({"path": editor or BUILTIN})
    if not editor:
        # RUN/adapter and RUN/adapter/FILE both belong to RUN.
        runs = [(place if place.is_dir() else place.parent).parent for place in adapters]
        editors = {
            run: load_config(run / "config.yaml").editor
            for run in runs
            if (run / "config.yaml").is_file()
        }
        if len({each.path for each in editors.values()}) > 1:
            seen = ", ".join(f"{run}: {each.path}" for run, each in editors.items())
            raise InputError(
                f"the adapters are of different editors ({seen}): give those of one editor, or "
                "name it by --editor"
            )
        config = next(iter(editors.values()), config)
    # Nothing reads attention here, so none is recorded.
    changes: dict[str, Any] = {"attention_layers": 0}
    if resolution:
        changes["resolution"] = resolution
    return editor_config({**config.model_dump(), **changes})
